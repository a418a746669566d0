-- From schema 7 to 8.
alter table ValidPaths add column ultimate integer;
alter table ValidPaths add column sigs text;
