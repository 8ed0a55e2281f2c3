"""A stand-in for the Hugging Face hub: serves root/<organisation>/<repository>/<file> on this machine."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._answer(self._list("/".join(parts[2:4]), "tree" in parts), "")
            return
        path = self.server.root.joinpath(
            *parts[:2], *parts[4:]
        )  # <repository>/resolve/<revision>/...
        self._answer(path.read_bytes() if path.is_file() else None, "EntryNotFound")

    do_HEAD = do_GET

    def _list(self, name, is_tree):
        folder = self.server.root / name
        files = [p for p in folder.rglob("*") if p.is_file()]
        if not files:
            return None
        names = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in files]
        tree = [{"type": "file", "path": n, "size": size, "oid": "0"} for n, size in names]
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n, _ in names]}
        return json.dumps(tree if is_tree else info).encode()

    def _answer(self, body, error):
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", error)
        body = body or b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(root):
    """Within: (the value for $HF_ENDPOINT, the list of paths that were asked for)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.asked = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
    finally:
        server.shutdown()
