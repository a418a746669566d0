-- From schema 9 to 10.
alter table ValidPaths add column ca text;
