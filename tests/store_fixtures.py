"""Object stores in this process, for tests: one that speaks S3, and one that speaks the API of Google Cloud Storage."""

import contextlib
import socketserver

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


@contextlib.contextmanager
def start_google_store(bucket: str):
    """As `start_store`, for gs://. Yields its gcsfs file system."""
    gcsfs = pytest.importorskip('gcsfs')
    emulator = pytest.importorskip('gcp_storage_emulator.server')
    with pytest.MonkeyPatch.context() as patch:
        # It prints the traceback of every connection that a client closes early.
        patch.setattr(socketserver.BaseServer, 'handle_error', lambda self, request, address: None)
        server = emulator.create_server('localhost', 0, in_memory=True, default_bucket=bucket)
        server.start()
        try:
            patch.setenv('STORAGE_EMULATOR_HOST', f'http://localhost:{server._api._httpd.server_address[1]}')
            patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # it asks Google what kind of bucket it is
            gcsfs.GCSFileSystem.clear_instance_cache()
            yield gcsfs.GCSFileSystem(use_listings_cache=False)
        finally:
            gcsfs.GCSFileSystem.clear_instance_cache()
            server.stop()
