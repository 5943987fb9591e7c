"""A server on loopback that speaks S3, for folders behind URLs.

`python tests/support/s3.py IP [SECONDS]` prints its address and serves until its standard input
ends; each request takes so many seconds longer.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"


@contextmanager
def s3_server(ip: str = "127.0.0.1", delay: float = 0.0) -> Iterator[str]:
    """The address of a server that lives as long as the block; each request is delayed, seconds.

    In a process of its own: it loads a web framework whose objects fail when they are looked at,
    and vLLM, where it starts, looks at every object of every module.
    """
    words, pipe = [sys.executable, __file__, ip, f"{delay}"], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate()  # ends its input, and so the server


def serve(ip: str, delay: float = 0.0) -> None:
    """Serve until the standard input ends."""
    from moto.moto_server import threaded_moto_server as moto

    class Delayed(moto.DomainDispatcherApplication):
        def __call__(self, *words: Any) -> Any:
            time.sleep(delay)
            return super().__call__(*words)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto.DomainDispatcherApplication = Delayed
    server = moto.ThreadedMotoServer(ip_address=ip, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    server.stop()


def lead_to(address: str) -> None:
    """Let this process and its children find S3 at an address; to be undone by the caller."""
    from s3fs import S3FileSystem

    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "NO_PROXY": "127.0.0.1",
    }
    S3FileSystem.clear_instance_cache()  # or the next path goes where the last one went


class Bucket:
    """A bucket as its server sees it, past all that this package does."""

    def __init__(self, address: str) -> None:
        import boto3

        self.address = address
        self.client: Any = boto3.client("s3")
        self.client.create_bucket(Bucket=BUCKET)

    def names(self, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return sorted(each["Key"] for each in found)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def remove(self, *keys: str) -> None:
        for key in keys:
            self.client.delete_object(Bucket=BUCKET, Key=key)

    def folder(self, name: str) -> dict[str, bytes]:
        """The objects of a folder: their names and contents."""
        return {key.removeprefix(f"{name}/"): self.get(key) for key in self.names(f"{name}/")}


if __name__ == "__main__":
    serve(sys.argv[1], *map(float, sys.argv[2:]))
