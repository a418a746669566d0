-- The tables of a Nix store, schema 10, as Nix 2.8 to 2.34 make and expect them.
-- Names of tables, columns, indices and the trigger, and all clauses, are shared with other programs: never change them.

create table if not exists ValidPaths (
    id               integer primary key autoincrement not null,  -- never reused
    path             text unique not null,                        -- the full logical path
    hash             text not null,                               -- of the NAR: "sha256:" and base-16
    registrationTime integer not null,                            -- seconds since 1970
    deriver          text,                                        -- the full path of a .drv, valid or not; never ''
    narSize          integer,                                     -- bytes of the NAR; null if unknown, never 0
    ultimate         integer,                                     -- 1: built here; null: not; never 0
    sigs             text,                                        -- sorted, joined by blanks; null if none
    ca               text                                         -- content address; null if there is none
);

create table if not exists Refs (
    referrer  integer not null,  -- ValidPaths.id
    reference integer not null,  -- ValidPaths.id of what it refers to, itself perhaps
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);

-- Redundant beside the primary key, but Nix up to 2.34 makes it.
create index if not exists IndexReferrer on Refs(referrer);
create index if not exists IndexReference on Refs(reference);

-- A path that refers to itself could not be deleted otherwise: "restrict" forbids it.
create trigger if not exists DeleteSelfRefs before delete on ValidPaths
begin
    delete from Refs where referrer = old.id and reference = old.id;
end;

create table if not exists DerivationOutputs (
    drv  integer not null,  -- ValidPaths.id of the .drv
    id   text not null,     -- the output's name, mostly "out"
    path text not null,     -- the full logical path of the output, valid or not
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);

create index if not exists IndexDerivationOutputs on DerivationOutputs(path);
