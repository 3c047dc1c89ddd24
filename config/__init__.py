"""Configuration: schema, presets, service units."""
