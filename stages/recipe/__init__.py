"""From a YAML file to typed, resolved stages."""
