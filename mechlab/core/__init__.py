"""The functional core: sites, edits, selection, transforms, sweeps, random streams, sharding, errors."""
