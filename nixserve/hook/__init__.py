"""
Nix's build hook: takes builds from a Nix on this machine and has them done on others.
"""
