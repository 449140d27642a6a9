"""Rows and checkpoints kept in a folder, by key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoints
from .about import certificates_of, check_about, check_batch, witnesses_of
from .batches import (
    DTYPES,
    FORMAT_VERSION,
    SUFFIX,
    Damaged,
    check_key,
    decode_states,
    digest,
    encode_response,
    encode_states,
    responses_head,
    states_head,
    warn,
)
from .files import absolute, commit, default_folder, private_by_default, remove
from .index import Index


class Store:
    """Rows and checkpoints in one folder, which several processes may share.

    Nothing is created before the first write.

    Parameters
    ----------
    folder : Path or str, optional
        Default: ANALYSIS_LIB_STORE, else the platform's folder for caches.
    recheck : bool
        Whether a call first computes one known state of a loaded model anew. Where it differs,
        the call uses no store, and a warning says why.
    private : bool, optional
        Whether nobody else can read the store, from the next write on. Default:
        ANALYSIS_LIB_PRIVATE.

    Raises
    ------
    StoreError
        Where the folder cannot be a path. The first use raises it where that cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from analysis_lib import Store
    >>> from analysis_lib.store.batches import row_key
    >>> key = row_key(model="a fingerprint", ids=[1, 2], layer=-1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Store(folder)
    ...     store.write_states([key], np.ones((1, 3), np.float32), dtype="float32", about={})
    ...     found = Store(folder).read_states([key])
    >>> found[key].tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(
        self, folder: Path | str | None = None, *, recheck: bool = True, private: bool | None = None
    ) -> None:
        self.recheck = recheck
        self.private = private_by_default() if private is None else private
        self.folder = absolute(folder) if folder is not None else default_folder()
        self._index = {kind: Index(self.root, kind) for kind in SUFFIX}

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    @property
    def root(self) -> Path:
        """The folder of this format version."""
        return self.folder / f"v{FORMAT_VERSION}"

    def read_states(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Those of the states that are kept.

        Rows that fail their checksum are left out; a StoreDamage warning names them.

        Parameters
        ----------
        keys : sequence of str
            Keys made with `row_key`.

        Returns
        -------
        dict
            {key: state (d,) float32}, in the order of `keys`.

        Raises
        ------
        StoreError
            Where the folder cannot be read.
        """
        parts: dict[tuple[str, int], list[tuple[str, bytes]]] = defaultdict(list)
        for key, (batch, data) in self._index["states"].fetch(keys).items():
            parts[batch.dtype, len(data)].append((key, data))
        found = {
            key: state
            for (dtype, _), rows in parts.items()
            for (key, _), state in zip(
                rows, decode_states([data for _, data in rows], dtype), strict=True
            )
        }
        return {key: found[key] for key in dict.fromkeys(keys) if key in found}

    def certificates(self, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """The parity certificates that kept states were committed with, as of the last read.

        There are several where a row was committed twice, or where batches were compacted. Those of
        another program are left out.

        Parameters
        ----------
        keys : sequence of str
            Keys made with `row_key`.

        Returns
        -------
        dict
            {key: list of certificates} for the states that are kept.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from analysis_lib import Store
        >>> certificate = {"way": "tree", "checked": 1, "max_abs": 0.0, "max_rel": 0.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, key = Store(folder), "0" * 64
        ...     about = {"certificate": certificate}
        ...     store.write_states([key], np.ones((1, 3), np.float32), dtype="float32", about=about)
        ...     _ = store.read_states([key])
        ...     store.certificates([key])[key] == [certificate]
        True
        """
        index, known = self._index["states"], dict[tuple[str, ...], list[dict[str, Any]]]()
        found = {}
        for key in keys:
            if key in index.where:
                batches = index.copies(key)
                names = tuple(batch.path.name for batch in batches)
                if names not in known:
                    known[names] = certificates_of(batch.about for batch in batches)
                found[key] = known[names]
        return found

    def witnesses(self, keys: Sequence[str], model: str) -> list[dict[str, Any]]:
        """What batches say of a state of the model that wrote them.

        Parameters
        ----------
        keys : sequence of str
            Keys of responses.
        model : str
            A model's fingerprint.

        Returns
        -------
        list of dict
            The witnesses of the responses' batches; without one, of all batches of the model.

        Examples
        --------
        >>> import tempfile
        >>> from analysis_lib import Store
        >>> seen = {"ids": [1], "soft": "", "layer": -1, "dtype": "float32", "width": 1}
        >>> about = {"model": "a", "witness": seen | {"size": 2.0, "state": [2.0]}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, key = Store(folder), "0" * 64
        ...     store.write_responses([key], [{"response": "No.", "end": "eos"}], about=about)
        ...     store.witnesses([key], "a")[0]["ids"]
        [1]
        """
        here = self._index["responses"]
        near = {id(b): b.about for k in keys if k in here.where for b in here.copies(k)}
        if found := witnesses_of(near.values()):
            return found
        return witnesses_of(about for about in self._abouts() if about.get("model") == model)

    def _abouts(self) -> Iterator[Mapping[str, Any]]:
        for index in self._index.values():
            index.scan()
            yield from (batch.about for batch in index.batches.values())

    def write_states(
        self, keys: Sequence[str], states: np.ndarray, *, dtype: str, about: Mapping[str, Any]
    ) -> None:
        """Commits one batch of states.

        Parameters
        ----------
        keys : sequence of str
            One a row, made with `row_key`.
        states : ndarray
            Shape (n, d), float32.
        dtype : str
            "bfloat16", "float16" or "float32": what the states are kept as.
        about : mapping
            JSON that describes the batch for `ls` and `prune`: model (fingerprint), model_name,
            prompts, layer, certificate. It does not take part in finding rows.

        Raises
        ------
        ValueError
            Where `dtype` cannot hold a value exactly, or an argument is wrong. Nothing of the batch
            is kept then.
        StoreError
            Where the folder cannot be written. Nothing of the batch is kept then.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from analysis_lib import Store
        >>> states = np.ones((2, 3), np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, keys = Store(folder), ["0" * 64, "1" * 64]
        ...     store.write_states(keys, states, dtype="bfloat16", about={"layer": -1})
        ...     len(store.read_states(keys))
        2
        """
        dtype = dtype.removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not kept; choose one of {', '.join(DTYPES)}")
        array = isinstance(states, np.ndarray)
        if not array or states.dtype != np.float32 or states.ndim != 2 or 0 in states.shape[1:]:
            what = f"{states.dtype} {states.shape}" if array else type(states).__name__
            raise ValueError(f"states must be a float32 array of shape (n, d), not {what}")
        if check_batch(keys, len(states)):
            rows = encode_states(keys, states, dtype)
            self._commit_batch("states", states_head(keys, rows, check_about(about), dtype), rows)

    def read_responses(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the responses that are kept.

        Parameters, errors and warnings are those of `read_states`.

        Returns
        -------
        dict
            {key: row}, in the order of `keys`.

        Examples
        --------
        >>> import tempfile
        >>> from analysis_lib import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, key = Store(folder), "0" * 64
        ...     store.write_responses([key], [{"response": "Yes.", "end": "eos"}], about={})
        ...     store.read_responses([key, "1" * 64])[key]["response"]
        'Yes.'
        """
        found = self._index["responses"].fetch(keys)
        return {key: found[key][1] for key in dict.fromkeys(keys) if key in found}

    def write_responses(
        self, keys: Sequence[str], rows: Sequence[Mapping[str, Any]], *, about: Mapping[str, Any]
    ) -> None:
        """Commits one batch of responses.

        Parameters
        ----------
        keys : sequence of str
            One a row, made with `row_key`.
        rows : sequence of mapping
            JSON objects that come back as they were.
        about : mapping
            As in `write_states`.

        Raises
        ------
        ValueError
            Where a row is not JSON, or an argument is wrong. Nothing of the batch is kept then.
        StoreError
            Where the folder cannot be written. Nothing of the batch is kept then.

        Examples
        --------
        >>> import tempfile
        >>> from analysis_lib import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, key = Store(folder), "0" * 64
        ...     store.write_responses([key], [{"response": "No.", "end": "eos"}], about={})
        ...     list(store.read_responses([key])) == [key]
        True
        """
        if check_batch(keys, len(rows)):
            lines = [encode_response(key, row) for key, row in zip(keys, rows, strict=True)]
            self._commit_batch("responses", responses_head(keys, lines, check_about(about)), lines)

    def read_checkpoint(self, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """A training's last checkpoint.

        A StoreDamage warning tells of a damaged one.

        Parameters
        ----------
        key : str
            The training's key, made with `row_key`.

        Returns
        -------
        (dict, dict) or None
            Tensors and about, as they were written; None without a sound checkpoint.

        Raises
        ------
        StoreError
            Where the folder cannot be read.
        """
        check_key(key)
        path = checkpoints.path_of(self.root, key)
        try:
            found = checkpoints.read(path)
        except FileNotFoundError:
            return None
        except Damaged as reason:
            warn(path, reason, [key])
            return None
        return dict(found.tensors), dict(found.about)

    def write_checkpoint(
        self, key: str, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]
    ) -> None:
        """Keeps a training's checkpoint in place of its last one.

        Parameters
        ----------
        key : str
            The training's key, made with `row_key`.
        tensors : mapping
            {name: float32 or float64 array of any shape}; they come back bit for bit.
        about : mapping
            JSON that comes back too. `ls` and `prune` read its model, model_name, prompts and
            layer.

        Raises
        ------
        ValueError
            For anything else. The last checkpoint stays then.
        StoreError
            Where the folder cannot be written. The last checkpoint stays then.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from analysis_lib import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, key = Store(folder), "0" * 64
        ...     store.write_checkpoint(key, {"soft": np.zeros((2, 3))}, {"step": 4})
        ...     tensors, about = store.read_checkpoint(key)
        >>> tensors["soft"].shape, about
        ((2, 3), {'step': 4})
        """
        check_key(key)
        content = checkpoints.encode(key, tensors, about)
        commit(checkpoints.path_of(self.root, key), [content], private=self.private)

    def drop_checkpoint(self, key: str) -> None:
        """Removes a training's checkpoint, once its outcome is kept.

        Parameters
        ----------
        key : str
            The training's key, made with `row_key`.

        Raises
        ------
        StoreError
            Where the file cannot be removed.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from analysis_lib import Store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store, key = Store(folder), "0" * 64
        ...     store.write_checkpoint(key, {"soft": np.zeros(3)}, {})
        ...     store.drop_checkpoint(key)
        ...     store.read_checkpoint(key) is None
        True
        """
        check_key(key)
        remove(checkpoints.path_of(self.root, key))

    def _commit_batch(self, kind: str, head: bytes, rows: Sequence[bytes]) -> None:
        target = self.root / kind / (digest(head) + SUFFIX[kind])
        commit(target, [head, *rows], private=self.private)
