#!/usr/bin/env python3
"""Lists or extracts archived WAL from the directory of a repository and its key file, and from nothing else.

Written from repository/FORMAT.md alone (12), on top of what restore.py makes of the rest of it.

    wal.py list REPOSITORY KEY-FILE LINEAGE
    wal.py get REPOSITORY KEY-FILE LINEAGE FILE TO

TO must not exist. Histories and unfinished segments are files like any other; what was refused is not served.
"""

import os
import re
import struct
import sys
import uuid

from restore import ARCHIVE, GIB, MIB, Container, Damaged, Repository, blake3, demand, kdf


def timeline_of(name):
    """The digits that its timeline's directory has; None when the archive has no such names."""
    good = re.fullmatch(r"([0-9A-F]{8})([0-9A-F]{16}(\.partial|\.[0-9A-F]{8}\.backup)?|\.history)", name)
    return good and good[1]


def files(root, lineage):
    below = os.path.join(root, "lineages", lineage, "wal")
    for timeline in sorted(os.listdir(below) if os.path.isdir(below) else ()):
        names = sorted(os.listdir(os.path.join(below, timeline)))
        yield from (name for name in names if timeline_of(name) == timeline)


def read(repository, lineage, name):
    demand(timeline_of(name), f"{name} is not the name of a file of the archive")
    place = f"{timeline_of(name)}/{name}"
    path = os.path.join(repository.root, "lineages", lineage, "wal", place)
    object_id = kdf("place of an archived WAL file", place.encode())[:16]
    found = Container(repository, path, ARCHIVE, uuid.UUID(lineage), object_id)
    demand(found.frames and found.frames[0].codec == 0 and found.frames[0].length == 40, f"{path} has no head")
    head, *content = found.frames
    size, digest = struct.unpack(">Q32s", found.frame(head))
    demand(size == sum(frame.length for frame in content) <= GIB, f"{path} has another length than its head says")
    content = b"".join(map(found.frame, content))
    demand(blake3(content) == digest, f"{path} has other content than its head says")
    is_segment = len(name) == 24 or name.endswith(".partial")
    demand(not is_segment or size >= MIB and size & size - 1 == 0, f"{path} has {size} bytes, and no segment has")
    return content


def main(verb, root, key_file, lineage, name=None, to=None):
    repository = Repository(root, key_file)
    demand(repository.note(f"lineages/{lineage}/identity")["lineage"] == lineage, f"{lineage} is another lineage")
    if verb == "list":
        print("".join(name + "\n" for name in files(root, lineage)), end="")
        return
    demand(verb == "get" and to, f"{verb} with these arguments is nothing this reader can do")
    content = read(repository, lineage, name)
    with open(to, "xb") as file:
        file.write(content)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) in (5, 7) else sys.exit(__doc__)
    except (Damaged, OSError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"failed: {type(error).__name__}: {error}")
