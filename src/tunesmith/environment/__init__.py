"""The surroundings of the package: its version, packages that it needs, settings of torch's libraries, this
process and its children, and the hub."""
