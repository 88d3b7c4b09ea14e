"""A package that uses the C interface of the installed speechrnt."""
