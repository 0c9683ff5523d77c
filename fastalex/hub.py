"""Models on the Hugging Face Hub: what `AlexNet.from_pretrained` and `AlexNet.push_to_hub` ask the network for.

Needs the package huggingface_hub only where something is fetched or sent; a folder on the disk needs none.  Its
PyTorchModelHubMixin would do the same as a base class, but then a package that few need would be imported by all, or
AlexNet be another class where it is missing; and it would keep arguments of `__init__`, which know no class names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastalex.card import MODEL
from fastalex.files import write_whole

README = """---
library_name: fastalex
pipeline_tag: image-classification
tags:
- alexnet
---

An AlexNet. `pip install 'fastalex[hub]'`, then:

```python
import fastalex

model = fastalex.AlexNet.from_pretrained("{name}")
print(model.variant, model.card.classes, model.card.preprocessing)
```
"""


def client() -> Any:
    """The package.  Raises ImportError, with the remedy, where it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hugging Face Hub needs its package: pip install 'fastalex[hub]'") from error
    return huggingface_hub


def fetch(source: str | Path, **options: Any) -> Path:
    """`model.safetensors` in a folder, or from a repository on the Hub, downloaded once to its cache.

    options: of `huggingface_hub.hf_hub_download` (revision, token, cache_dir, force_download, local_files_only).
    Raises FileNotFoundError for a folder without that file, else what huggingface_hub raises.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / MODEL).is_file():
            raise FileNotFoundError(f"no {MODEL} in {folder}")
        return folder / MODEL
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {source}")
    return Path(client().hf_hub_download(str(source), MODEL, **options))


def send(folder: Path, repo_id: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Everything in the folder into a repository, which is made if there is none; returns the commit's address.

    A README that is there stays.
    """
    api = client().HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if not api.file_exists(name, "README.md"):
        write_whole(folder / "README.md", README.format(name=name))
    return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
