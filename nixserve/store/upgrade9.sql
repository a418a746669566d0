-- From schema 8 to 9.
drop table if exists FailedPaths;
