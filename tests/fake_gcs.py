"""Cloud Storage's JSON API, as much of it as a run needs, in this process's memory."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class FakeGcs:
    """A server with one empty bucket, "bucket"; use it as a context manager.

    Attributes:
      objects: (bucket, name) -> (generation, bytes).
      requests: (method, name of the object or None), in order.
      refuse: (method, name or None) -> an HTTP status to answer with, or 0.
      environ: with which a process's libraries come here.
    """

    def __init__(self):
        self.objects, self.requests, self.sessions = {}, [], {}
        self.refuse = lambda method, name: 0
        self.lock, self.generation = threading.RLock(), 0
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environ = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": "none",
            # gRPC, to ask of which kind a bucket is; there is none here.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def put(self, bucket, name, data):
        with self.lock:
            self.generation += 1
            self.objects[bucket, name] = (self.generation, bytes(data))

    def names(self, prefix=""):
        with self.lock:
            return sorted(
                n for b, n in self.objects if b == "bucket" if n.startswith(prefix)
            )

    def read(self, name):
        return self.objects["bucket", name][1]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Clients close connections when they like."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gcs: FakeGcs

    def log_message(self, *_):
        pass

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        found = re.fullmatch(
            r"(?:/\w+)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path
        )
        if not found:
            return self._send(501, {"error": {"message": url.path}})
        bucket, name = found[1], urllib.parse.unquote(found[2] or "") or None
        if url.path.startswith("/upload/"):
            name, body = self._uploaded(query, body)
        self.gcs.requests.append((self.command, name))
        if status := self.gcs.refuse(self.command, name):
            return self._send(status, {"error": {"message": "refused"}})
        with self.gcs.lock:
            if bucket != "bucket":
                return self._send(404, {"error": {"message": f"no bucket {bucket}"}})
            if url.path.startswith("/upload/"):
                if query.get("uploadType") == "resumable":
                    return self._resumable(bucket, name, query, body)
                return self._write(bucket, name, query, body)
            if copy := re.fullmatch(r".*/o/(.*)/rewriteTo/b/(.*)/o/(.*)", url.path):
                source, _, target = map(urllib.parse.unquote, copy.groups())
                data = self.gcs.objects[bucket, source][1]
                self.gcs.put(bucket, target, data)
                return self._send(200, {"done": True})
            if not url.path.endswith("/o") and name is None:
                return self._send(200, {"name": bucket, "kind": "storage#bucket"})
            if name is None:
                return self._send(200, self._listed(bucket, query))
            return self._object(bucket, name, query)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer

    def _uploaded(self, query, body):
        """The name and the bytes: multipart has them between boundaries."""
        kind = self.headers.get("Content-Type", "")
        if not kind.startswith("multipart/"):
            return query.get("name"), body
        mark = re.search(r'boundary="?([^";]+)', kind)[1].encode()
        _, about, data = body.split(b"--" + mark)[:3]
        content = re.split(rb"\r?\n\r?\n", data, maxsplit=1)[1]
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        return json.loads(re.split(rb"\r?\n\r?\n", about)[1])["name"], content

    def _write(self, bucket, name, query, body):
        there = self.gcs.objects.get((bucket, name), (0, b""))[0]
        if int(query.get("ifGenerationMatch", there)) != there:
            return self._send(412, {"error": {"message": "another generation"}})
        self.gcs.put(bucket, name, body)
        return self._send(200, self._about(bucket, name))

    def _resumable(self, bucket, name, query, body):
        if (session := query.get("upload_id")) is None:
            session = str(len(self.gcs.sessions))
            self.gcs.sessions[session] = b""
            place = f"{self.gcs.url}{self.path}&upload_id={session}"
            return self._send(200, {}, {"Location": place})
        self.gcs.sessions[session] += body
        have = self.gcs.sessions[session]
        if not self.headers["Content-Range"].endswith(f"/{len(have)}"):
            return self._send(308, None, {"Range": f"bytes=0-{len(have) - 1}"})
        return self._write(bucket, name, query, have)

    def _object(self, bucket, name, query):
        if (bucket, name) not in self.gcs.objects:
            return self._send(404, {"error": {"message": "No such object"}})
        if self.command == "DELETE":
            del self.gcs.objects[bucket, name]
            return self._send(204, None)
        if query.get("alt") != "media":
            return self._send(200, self._about(bucket, name))
        generation, data = self.gcs.objects[bucket, name]
        status, headers = 200, {"x-goog-generation": str(generation)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and data:
            first, last = int(asked[1]), min(int(asked[2] or 1e18), len(data) - 1)
            if first >= len(data):
                return self._send(416, {"error": {"message": "range"}})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        return self._send(status, data, headers)

    def _about(self, bucket, name):
        generation, data = self.gcs.objects[bucket, name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        time = "2026-01-01T00:00:00.000Z"
        about = dict(bucket=bucket, name=name, generation=str(generation))
        about |= dict(size=str(len(data)), md5Hash=md5, metageneration="1")
        return about | dict(timeCreated=time, updated=time, kind="storage#object")

    def _listed(self, bucket, query):
        prefix, mark = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        first, last = query.get("startOffset", ""), query.get("endOffset")
        for name in self.gcs.names(prefix):
            if name < first or (last and name >= last):
                continue
            rest = name[len(prefix) :]
            if mark and mark in rest:
                folders.add(prefix + rest.split(mark)[0] + mark)
            else:
                items.append(self._about(bucket, name))
        most = int(query.get("maxResults", 1000))
        found = {"kind": "storage#objects", "items": items[:most]}
        return found | {"prefixes": sorted(folders)}

    def _send(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else b""
        if isinstance(content, dict):
            data = json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            kind = "json" if isinstance(content, dict) else "octet-stream"
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
