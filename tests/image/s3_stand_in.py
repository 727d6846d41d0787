"""Moto's S3 server in SeaweedFS's place: asks for the keys of its configuration file, and says that it is healthy.

    python s3_stand_in.py KEYS.json PORT

Moto takes any request, so signatures are checked here: a client without the secret key gets 403.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

SIGNED = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/\d+/([^/]+)/s3/aws4_request,\s*SignedHeaders=([^,]+),\s*Signature=(\w+)"
)


class Asks:
    """The server, for those who have the key."""

    def __init__(self, keys: dict[str, str]):
        self.keys = keys
        self.server = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/healthz":
            start("200 OK", [("Content-Length", "0")])
            return []
        if not self.knows(environ):
            start("403 Forbidden", [("Content-Length", "0")])
            return []
        return self.server(environ, start)

    def knows(self, environ: dict[str, Any]) -> bool:
        """Whether the request is signed with the secret of a key that is known: Signature Version 4, in a header."""
        match = SIGNED.match(environ.get("HTTP_AUTHORIZATION", ""))
        if match is None or match[1] not in self.keys:
            return False
        key, region, names, signature = match.groups()
        headers = {}
        for name in names.split(";"):
            place = name.upper().replace("-", "_")
            headers[name] = environ.get(f"HTTP_{place}", environ.get(place, ""))
        url = f"http://{environ['HTTP_HOST']}{environ['RAW_URI']}"
        request = AWSRequest(environ["REQUEST_METHOD"], url, headers=headers)
        request.context["timestamp"] = headers["x-amz-date"]
        signer = S3SigV4Auth(Credentials(key, self.keys[key]), "s3", region)
        to_sign = signer.string_to_sign(request, signer.canonical_request(request))
        return signer.signature(to_sign, request) == signature


if __name__ == "__main__":
    identities = json.loads(Path(sys.argv[1]).read_text())["identities"]
    pairs = [pair for identity in identities for pair in identity["credentials"]]
    known = {pair["accessKey"]: pair["secretKey"] for pair in pairs}
    run_simple("0.0.0.0", int(sys.argv[2]), Asks(known), threaded=True)  # type: ignore[arg-type]
