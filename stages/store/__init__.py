"""The floor of the house: typed configuration, the stage contract, folders, manifests, locks, atomic files."""
