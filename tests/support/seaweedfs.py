"""An S3 store: SeaweedFS, as its package brings it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from dev.stack import free_port, freeze


class SeaweedFS:
    """SeaweedFS's S3 server with its master, volume and filer, all on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        identities = {
            "identities": [
                {
                    "name": "tests",
                    "credentials": [{"accessKey": "key", "secretKey": "secret"}],
                    "actions": ["Read", "Write", "List", "Admin"],
                }
            ]
        }
        (folder / "s3.json").write_text(json.dumps(identities))
        (folder / "data").mkdir()
        names = ("master.port", "volume.port", "filer.port")
        ports = [f"-{name}{kind}={free_port()}" for name in names for kind in ("", ".grpc")]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("weed"),
                    "server",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-dir={folder / 'data'}",
                    "-volume.max=4",
                    "-master.volumeSizeLimitMB=64",
                    *ports,
                    "-s3",
                    f"-s3.port={self.port}",
                    f"-s3.port.grpc={free_port()}",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    f"-s3.config={folder / 's3.json'}",
                ],
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath, "HOME": str(folder)},
            )

    def freeze(self) -> None:
        """Connections are still accepted by the kernel, but nothing answers."""
        freeze([psutil.Process(self.process.pid)])

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
