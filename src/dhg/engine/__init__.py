"""The hypervisors, and the probe that picks the acceleration. Engines do not import each other."""
