"""An S3-compatible object store in this process, for tests."""

import contextlib

import pytest


@contextlib.contextmanager
def start_store(bucket: str):
    """Starts a store with one bucket, to which the environment then leads. Yields its s3fs file system."""
    s3fs = pytest.importorskip('s3fs')
    server = pytest.importorskip('moto.server').ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            host, port = server.get_host_and_port()
            patch.setenv('AWS_ENDPOINT_URL', f'http://{host}:{port}')
            patch.setenv('AWS_ACCESS_KEY_ID', 'key')
            patch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
            patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
            s3fs.S3FileSystem.clear_instance_cache()
            files = s3fs.S3FileSystem(use_listings_cache=False)
            files.mkdir(bucket)
            yield files
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
