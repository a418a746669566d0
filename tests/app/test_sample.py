"""
The store that comes with a demonstration.
"""

from nixserve.codec.pathinfo import topoSort


def test_sampleIsAClosure(box):
    """The demo's closure is what it says: objects that refer to each other, files, executables and links."""
    from nixserve.app.sample import makeSample

    _, store = box.store()
    (box.path / "work").mkdir()
    session = store.openSession()
    sample = makeSample(session, str(box.path / "work"))
    infos = session.queryPathInfos(session.queryClosure([sample.root]))
    assert len(infos) == sample.paths
    assert topoSort({path: info.references for path, info in infos.items()})[-1] == sample.root
    assert sum(info.narSize for info in infos.values()) == sample.narBytes
    assert sample.files > 200 and sample.executables and sample.links
    for path, info in infos.items():
        assert info.isContentAddressed(session.storeDir)
        contents = b"".join(session.narFromPath(path))
        assert all(reference.encode() in contents for reference in info.references)
    store.close()
