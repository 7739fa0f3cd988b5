"""Fixtures for the tests of conversion: stand-ins for buckets, and a temporary folder that is removed."""

import os
import pathlib
import tempfile

import fsspec
import pytest
from etils.epath import backend
from fsspec.registry import known_implementations

from data_prep import storage, video_files
from tests import world
from tests.data_prep import bucket


@pytest.fixture(scope="package", autouse=True)
def temporary_folder(tmp_path_factory):
    """Puts the temporary folder under pytest's own, to be removed with all that tests and killed processes leave in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture
def buckets(tmp_path, monkeypatch) -> pathlib.Path:
    """The local folder that stands for gs:// and s3://, in this process and in those it starts."""
    bucket.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(world.ROOT), str(tmp_path / "site")]))
    monkeypatch.setenv(bucket.FOLDER, str(tmp_path / "buckets"))
    monkeypatch.setenv("EPATH_USE_TF", "false")
    (tmp_path / "buckets" / "faults").mkdir(parents=True)
    for name in bucket.Buckets.protocol:
        fsspec.register_implementation(name, bucket.Buckets, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    video_files._listing.cache_clear()
    monkeypatch.setattr(storage, "_WAITS_S", (0.0, 0.0))
    yield tmp_path / "buckets"
    for name in bucket.Buckets.protocol:
        fsspec.register_implementation(name, known_implementations[name]["class"], clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    bucket.Buckets.clear_instance_cache()
