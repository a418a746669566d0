"""
Bytes and text to values and back. Pure: no file, socket, clock, environment or thread; standard library only.

What is C{bytes} and what is C{str}, everywhere in nixserve:

  - NAR entry names, symlink targets, file contents and NARs are C{bytes}: they go to the kernel as they are
    and are ordered bytewise.
  - Everything else is C{str}. Store paths, hashes, content addresses and output names are ASCII by their
    grammar. The text of derivations (platform, builder, arguments, environment), signatures and messages may
    be any bytes; they are decoded as UTF-8 with C{surrogateescape} (PEP 383), Python's own rule for file
    names and environments, so that every byte survives the round trip and C{os.fsencode} gives the exact
    bytes back. Order is still that of the bytes: sort with L{nixserve.codec.text.encodeText} as the key.
"""
