"""The stage contract on disk: folders, manifests, locks, atomic files."""
