"""
The Nix store on disk. Blocking, safe to call from any thread, free of Twisted; imports only the codec.
"""
