import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a family's small checkpoint, written when it is first asked for."""
    checkpoints = pytest.importorskip("verifier_checkpoints")
    written = {}

    def path(family):
        writer = checkpoints.WRITERS[family]
        if writer not in written:
            written[writer] = writer(tmp_path_factory.mktemp(writer.__name__) / "model")
        return written[writer]

    return path


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    """A family's tokenizer, as transformers loads it from the checkpoint."""
    from transformers import AutoTokenizer

    loaded = {}

    def of(family):
        path = checkpoint(family)
        if path not in loaded:
            loaded[path] = AutoTokenizer.from_pretrained(path)
        return loaded[path]

    return of
