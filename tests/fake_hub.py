"""A Hugging Face hub that answers from memory, in place of the network and nothing else."""

import hashlib
import json
import sys

import datasets
import huggingface_hub

_COMMIT = "a" * 40


class FakeHub:
    """Datasets, and `models`, by name: path of a file -> its bytes.

    `asked` has (method, path, range).
    """

    def __init__(self, monkeypatch, folder):
        self.repositories = {}
        self.models = {}
        self.asked = []
        self.fault = None  # an exception or a status for every request
        # Whatever library this release of the client speaks HTTP with.
        self._http = sys.modules[type(huggingface_hub.get_session()).__module__.split(".")[0]]
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        transport = self._http.MockTransport(self._answer)
        huggingface_hub.set_client_factory(lambda: self._http.Client(transport=transport))

    def close(self):
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)

    def add(self, name, rows, splits=("train",), declared=True, subset="default"):
        """A dataset with a JSONL file for each split."""
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        columns = "".join(f"  - name: {c}\n    dtype: string\n" for c in rows[0])
        counts = "".join(f"  - name: {s}\n    num_examples: {len(rows)}\n" for s in splits)
        info = (
            f"dataset_info:\n- config_name: {subset}\n  features:\n{columns}  splits:\n{counts}"
            if declared
            else ""
        )
        files = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in splits)
        readme = f"---\n{info}configs:\n- config_name: {subset}\n  data_files:\n{files}---\n"
        self.repositories[name] = {"README.md": readme.encode()} | {
            f"{split}.jsonl": body for split in splits
        }

    def _answer(self, request):
        path, byte_range = request.url.path, request.headers.get("range")
        self.asked.append((request.method, path, byte_range))
        if isinstance(self.fault, Exception):
            raise self.fault
        if self.fault is not None:
            return self._http.Response(self.fault, json={"error": "no"})
        named = [("datasets", "/datasets", *each) for each in self.repositories.items()]
        named += [("models", "", *each) for each in self.models.items()]
        for kind, prefix, name, files in named:
            if path.startswith(f"/api/{kind}/{name}"):
                if "/tree/" in path:
                    return self._http.Response(200, json=[_entry(*file) for file in files.items()])
                siblings = [{"rfilename": file} for file in files]
                return self._http.Response(
                    200, json={"id": name, "sha": _COMMIT, "siblings": siblings, "tags": []}
                )
            if path.startswith(f"{prefix}/{name}/resolve/"):
                file = path.split("/resolve/")[1].split("/", 1)[1]
                if file in files:
                    return self._file(files[file], request.method, byte_range)
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}
                return self._http.Response(404, headers=headers)
        return self._http.Response(404, headers={"X-Error-Code": "RepoNotFound"})

    def _file(self, content, method, byte_range):
        tag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": _COMMIT}
        if byte_range:
            first, last = byte_range.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return self._http.Response(206, content=part, headers=headers)
        headers["Content-Length"] = str(len(content))
        body = b"" if method == "HEAD" else content
        return self._http.Response(200, content=body, headers=headers)


def _entry(path, content):
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "oid": oid, "size": len(content), "path": path}
