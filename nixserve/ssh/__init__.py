"""
The serve protocol over SSH, on Conch: an endpoint that runs nothing but C{nix-store --serve}, and a client for it
that needs no C{ssh} program.

C{command} and C{keys} decide who may do what; C{transport} and C{channel} are Conch with flow control, shared by
C{server} and C{client}.
"""
