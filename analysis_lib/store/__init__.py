"""The crash-safe, content-addressed store of hidden states, sampled responses and checkpoints.

Its folder is `--store`, else ``ANALYSIS_LIB_STORE``, else the platform's folder for caches::

    v1/states/<name>.safetensors      one batch: tensor ``states`` (n, d) in BF16, F16 or F32
    v1/responses/<name>.jsonl         one batch: a header line, then a line {"key", "row"} per row
    v1/checkpoints/<key>.safetensors  one training's last checkpoint; the next one replaces it
    v1/writing/<random>.tmp           files that are not committed yet

A batch has a header: the safetensors header, or the first line. Under ``analysis_lib.store.v1`` it
lists the key and the SHA-256 of every row, and what the batch is about. ``<name>`` is the SHA-256
of the header, so the name covers every byte of the file. A flipped byte shows as a header that does
not match its name, or as a row that does not match its checksum. A checkpoint holds the SHA-256 of
the whole file.

Every file is written to ``writing/``, flushed to disk and renamed into place. A batch never changes
afterwards. Stores are merged by copying files.

There is no lock and no index on disk. Each process keeps an index in memory: it reads the headers
of files it has not seen, and lists the folder again at every request. An index on disk would have
to be kept right by several machines over shared folders, whose locks cannot be trusted. To read a
header takes about 0.05 ms (``python -m faults --speed``), once per process, and `compact` brings
the number of files down.

Nor does a process leave a note that it is at work. `prune` and `compact` spare every file younger
than a day instead, committed or not. So they take nothing from a run that wrote it today. Of an
older run they take at most rows that it can compute again.

Two batches may hold the same key, when two processes computed the same row. The copy with the
smallest checksum is used; where it is damaged, the next one. So everybody takes the same one,
before and after `compact`, whatever the times of the files and the order of a merge. A file's time
is its age, no more.

Files here: `store` (the rows), `upkeep` (ls, info, verify, prune, compact) with `compaction`,
`batches` and `checkpoints` (what is in a file), `about` (what a batch is about), `index` (which
file holds which row), `files` (writing and removing).
"""
