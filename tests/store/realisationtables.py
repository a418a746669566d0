"""
What Nix keeps in its database that stores here do not make themselves.
"""

REALISATIONS = """
    create table Realisations (
        id integer primary key autoincrement not null, drvPath text not null, outputName text not null,
        outputPath integer not null, signatures text)"""
"""Makes the table that is there once Nix's experimental feature C{ca-derivations} was on."""

REALISATION_ROWS = "select drvPath, outputName, path from Realisations join ValidPaths on ValidPaths.id = outputPath"
"""What it says."""
