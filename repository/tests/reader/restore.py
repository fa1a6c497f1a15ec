#!/usr/bin/env python3
"""Restores a backup from the directory of a repository and its key file, and from nothing else.

Written from repository/FORMAT.md alone, to show that the text is enough; numbers in brackets are its sections. Made to
be read, not to be quick: it verifies all packs before it uses one. Whatever is not as the text says ends it.

    restore.py list REPOSITORY KEY-FILE
    restore.py restore REPOSITORY KEY-FILE BACKUP DIRECTORY

KEY-FILE is - for a repository without encryption; DIRECTORY must not exist. Needs the Python packages cryptography (for
AES-GCM) and zstandard, and the program b3sum (for BLAKE3).
"""

import functools
import hmac
import json
import mmap
import os
import struct
import subprocess
import sys
import uuid
from collections import namedtuple

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONTENT, METADATA, WAL, MANIFEST, ARCHIVE = 1, 2, 3, 4, 5
DIRECTORY, FILE, LINK, LARGE_FILE = 0, 1, 2, 3
HEADER, TAIL, TAG, TABLE = 144, 48, 16, 2**32 - 1
SHARD_UNITS, SHARD_ENTRIES, INLINE_UNITS = 256, 512, 32

Pack = namedtuple("Pack", "id type size digest salt sealed_key")
Frame = namedtuple("Frame", "pack number offset stored length codec")
Reference = namedtuple("Reference", "frame units needs")
Entry = namedtuple("Entry", "kind path mode target size unit extents shards", defaults=(b"", 0, 0, (), ()))
Extent = namedtuple("Extent", "units frame offset")


class Damaged(Exception):
    """Something is not as the text says."""


def demand(condition, what):
    if not condition:
        raise Damaged(what)


def blake3(data, context=None):
    command = ["b3sum", "--raw", *(["--derive-key", context] if context else [])]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def kdf(purpose, *parts):
    return blake3(b"".join(parts), "pgmuster repository v1: " + purpose)


def unseal(key, nonce, sealed, associated, what):
    try:
        return AESGCM(key).decrypt(nonce, sealed, associated)
    except InvalidTag:
        raise Damaged(f"{what} does not open: it was changed, or the key is another one") from None


def from_hex(text, length, what):
    demand(len(text) == 2 * length and set(text) <= set("0123456789abcdef"), f"{what} has a key that is none")
    return bytes.fromhex(text)


class Cursor:
    """Takes bytes and numbers from the front (6)."""

    def __init__(self, data, what):
        self.data, self.at, self.what = data, 0, what

    def take(self, length):
        demand(length <= len(self.data) - self.at, f"{self.what} ends too early")
        self.at += length
        return self.data[self.at - length : self.at]

    def byte(self):
        return self.take(1)[0]

    def varint(self):
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                demand((byte or shift == 7) and value < 2**64, f"{self.what} has a number in a wrong notation")
                return value
            demand(shift < 70, f"{self.what} has a number that is too long")

    def sized(self):
        length = self.varint()
        demand(1 <= length <= 4096, f"{self.what} has a name of {length} bytes")
        return self.take(length)

    def many(self, smallest, read, limit=2**64):
        """A count and so many things of at least `smallest` bytes, never more than what follows could hold (9)."""
        count, room = self.varint(), (len(self.data) - self.at) // smallest
        demand(count <= min(limit, room), f"{self.what} counts {count} where so many cannot be")
        return [read() for _ in range(count)]

    def end(self):
        demand(self.at == len(self.data), f"{self.what} has bytes behind its end")


class Container:
    """A pack or a manifest, verified as a whole (5, 9)."""

    def __init__(self, repository, path, kind, lineage, object_id):
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            limit = {MANIFEST: 512 * MIB, ARCHIVE: GIB + MIB}.get(kind, GIB)
            demand(HEADER + TAG + TAIL <= size <= limit, f"{path} has {size} bytes")
            self.data = data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header = struct.pack(">8s4B4x", b"pgmuster", 1, kind, 1, 1) + repository.id + lineage.bytes + object_id
        demand(data[:64] == header, f"the header of {path} is that of another object")
        table_length, count, self.digest, end = struct.unpack(">II32s8s", data[-TAIL:])
        demand(end == b"retsumgp" and blake3(data[:-40]) == self.digest, f"{path} does not have the digest at its end")
        self.salt, self.sealed_key, self.bound = bytes(data[64:96]), bytes(data[96:HEADER]), bytes(data[:96])
        wrap = kdf("wrap of a pack key", repository.class_keys[kind], self.bound)
        self.key = unseal(wrap, bytes(12), self.sealed_key, self.bound, path)
        table_at = size - TAIL - table_length
        fits = count <= 2**20 and table_length == 9 * count + TAG and table_at >= HEADER
        demand(fits, f"{path} has a table of a wrong size")
        self.frames, offset, table = [], HEADER, self.open(TABLE, table_at, table_length, 9 * count, 0)
        for number, (stored, length, codec) in enumerate(struct.iter_unpack(">IIB", table)):
            self.frames.append(Frame(object_id, number, offset, stored, length, codec))
            offset += stored
        demand(offset == table_at, f"the frames of {path} do not fill it")

    def open(self, number, offset, stored, length, codec):
        what = f"frame {number} of {self.path}"
        fits = length <= 16 * MIB and TAG <= stored <= 16 * MIB + TAG and offset + stored <= len(self.data)
        demand(fits and codec in (0, 1), f"{what} is none that can be")
        sealed, nonce = bytes(self.data[offset : offset + stored]), struct.pack(">8xI", number)
        content = unseal(self.key, nonce, sealed, self.bound + struct.pack(">IBI", number, codec, length), what)
        if codec == 1:
            try:
                demand(zstandard.frame_content_size(content) in (-1, length), f"{what} has another length inside")
                content = zstandard.ZstdDecompressor().decompress(content, max_output_size=length)
            except zstandard.ZstdError as error:
                raise Damaged(f"{what} cannot be decompressed: {error}") from None
        demand(len(content) == length, f"{what} has another length than it says")
        return content

    def frame(self, frame):
        demand([frame] == self.frames[frame.number :][:1], f"frame {frame.number} of {self.path} is another one")
        return self.open(*frame[1:])


class Repository:
    """The objects below one config (2, 3, 4)."""

    def __init__(self, root, key_file):
        self.root = root
        config = json.loads(self.read("config").split(b"\n")[0])
        known = config["magic"] == "pgmuster-repository" and config["format"] == 1 and not config["features"]["read"]
        demand(known, "this is no repository of format 1, or it has features that this reader does not know")
        self.id = uuid.UUID(config["repository"]).bytes
        master = self.master_key(key_file)
        self.index_key, data_key = kdf("index key", master, self.id), kdf("data key", master, self.id)
        self.class_keys = {kind: self.index_key if kind in (METADATA, MANIFEST) else data_key for kind in range(1, 6)}
        self.note("config")

    def read(self, key):
        with open(os.path.join(self.root, key), "rb") as file:
            demand(os.fstat(file.fileno()).st_size <= MIB, f"{key} is too large for what it is")
            return file.read(MIB)

    def master_key(self, key_file):
        if key_file == "-":
            return self.wrapped("keys/open", "open", 32)
        with open(key_file, encoding="utf-8") as file:
            lines = [line.split() for line in file if line.lstrip().startswith("pgmuster-key-1")]
        demand(lines and len(lines[0]) == 4, f"{key_file} has no line with a key")
        words = [word.replace("-", "").lower() for word in lines[0][1:]]
        key_id, secret, check = (from_hex(word, length, key_file) for word, length in zip(words, (16, 32, 4)))
        demand(kdf("check digits of a key file", key_id, secret)[:4] == check, f"a digit in {key_file} is wrong")
        wrapped = self.wrapped(f"keys/{words[0]}", "key-file", 60)
        wrap = kdf("wrap of the master key by a key file", secret, key_id, self.id)
        return unseal(wrap, wrapped[:12], wrapped[12:], words[0].encode(), f"keys/{words[0]}")

    def wrapped(self, key, recipient, length):
        line = json.loads(self.read(key))
        demand(line["magic"] == "pgmuster-wrapped-key-1" and line["recipient"] == recipient, f"{key} is no such key")
        return from_hex(line["wrapped"], length, key)

    def note(self, key):
        lines = self.read(key).split(b"\n")
        demand(len(lines) == 3 and not lines[2], f"{key} is no note")
        code = kdf("authentication of a note", self.index_key, struct.pack("<Q", len(key)), key.encode(), lines[0])
        demand(hmac.compare_digest(code.hex().encode(), lines[1]), f"the code of {key} does not fit")
        return json.loads(lines[0])

    def attempts(self):
        """Every attempt of every lineage: lineage, identity, attempt, and its verdict or None."""
        for name in sorted(os.listdir(os.path.join(self.root, "lineages"))):
            below, path = f"lineages/{name}/backups", os.path.join(self.root, "lineages", name, "backups")
            identity = self.note(f"lineages/{name}/identity")
            numbers = struct.pack("<QI", int(identity["system_identifier"]), identity["generation"])
            contexts = {"physical": "lineage id", "logical": "lineage id of logical backups"}
            context = contexts[identity.get("kind", "physical")]
            minted = bytearray(kdf(context, self.index_key, numbers, identity["cluster"].encode())[:16])
            minted[6], minted[8] = minted[6] & 0x0F | 0x80, minted[8] & 0x3F | 0x80
            demand(identity["lineage"] == name == str(uuid.UUID(bytes=bytes(minted))), f"{name} is another lineage")
            for attempt in sorted(os.listdir(path) if os.path.isdir(path) else ()):
                there = set(os.listdir(os.path.join(path, attempt)))
                notes = {name: self.note(f"{below}/{attempt}/{name}") for name in there & {"intent", "verdict"}}
                demand(all(note["attempt"] == attempt for note in notes.values()), f"{attempt} has notes of another")
                yield uuid.UUID(name), identity, uuid.UUID(attempt), notes.get("verdict")


class Backup:
    """A committed attempt: its manifest, and its packs, every one verified (6, 7, 9)."""

    def __init__(self, repository, lineage, attempt, verdict):
        demand(verdict and verdict["verdict"] == "COMMIT", f"{attempt} is not a backup")
        below = os.path.join(repository.root, "lineages", str(lineage))
        path = os.path.join(below, "backups", str(attempt), "manifest")
        manifest = Container(repository, path, MANIFEST, lineage, attempt.bytes)
        meant = verdict["manifest_bytes"], verdict["manifest_blake3"]
        demand((len(manifest.data), manifest.digest.hex()) == meant, f"{path} is another one than the verdict says")
        demand(manifest.frames and sum(frame.length for frame in manifest.frames) <= GIB, f"{path} has no right size")
        head, *body = [manifest.frame(frame) for frame in manifest.frames]
        head, body = json.loads(head), Cursor(b"".join(body), path)
        own = str(uuid.UUID(bytes=repository.id)), str(lineage), str(attempt), 1
        named = tuple(head[name] for name in ("repository", "lineage", "attempt", "format"))
        demand(named == own, f"the head of {path} is that of another backup")
        packs = body.many(130, lambda: Pack(body.take(16), body.byte(), body.varint(), *map(body.take, (32, 32, 48))))
        self.packs, self.types = {}, {}
        for pack in packs:
            name = pack.id.hex()
            demand(pack.type in (CONTENT, METADATA, WAL) and pack.id not in self.packs, f"{path} lists a wrong pack")
            found = Container(repository, os.path.join(below, "packs", name[:2], name), pack.type, lineage, pack.id)
            same = pack[2:] == (len(found.data), found.digest, found.salt, found.sealed_key)
            demand(same, f"{found.path} is another one than the manifest says")
            self.packs[pack.id], self.types[pack.id] = found, pack.type
        ids = [pack.id for pack in packs]
        lists = [body.many(11, lambda: (body.sized(), self.reference(body, ids))) for _ in range(3)]
        body.end()
        self.entries, self.late, self.wal = (self.read_list(*each) for each in zip(lists, (CONTENT, CONTENT, WAL)))
        self.open_frame = functools.lru_cache(32)(lambda frame: self.packs[frame.pack].frame(frame))

    def frame(self, cursor, ids):
        pack, number, offset, stored, length = (cursor.varint() for _ in range(5))
        demand(pack < len(ids), f"{cursor.what} names a pack that it does not list")
        return Frame(ids[pack], number, offset, stored, length >> 1, length & 1)

    def reference(self, cursor, ids):
        frame, hashes, units = self.frame(cursor, ids), cursor.varint(), cursor.varint()
        demand(hashes in (0, 8 * units + TAG), f"{cursor.what} has hashes of a wrong size")
        needs = cursor.many(1, cursor.varint)
        demand(all(index < len(ids) for index in needs), f"{cursor.what} needs a pack that it does not list")
        return Reference(frame, units, {ids[index] for index in needs})

    def shard(self, reference, kind, content):
        """Opens a shard; what stands behind its tables is still to be read."""
        pack = reference.frame.pack
        demand(self.types[pack] == METADATA, f"a shard lies in {pack.hex()}, which holds no metadata")
        shard = Cursor(self.packs[pack].frame(reference.frame), f"shard {reference.frame.number} of {pack.hex()}")
        demand(shard.byte() == kind, f"{shard.what} is of another kind")
        ids = shard.many(16, lambda: shard.take(16))
        demand(len(ids) == len(set(ids)) and {pack, *ids} <= reference.needs, f"{shard.what} lists wrong packs")
        frames = shard.many(5, lambda: self.frame(shard, ids))
        types, places = {self.types[frame.pack] for frame in frames}, {frame[:2] for frame in frames}
        demand(types <= {content} and len(places) == len(frames), f"{shard.what} lists wrong frames")
        return shard, ids, frames

    def extents(self, shard, frames, size, unit):
        """Extents that describe exactly `size` bytes."""
        def extent():
            units, frame = shard.varint(), shard.varint()
            demand(frame <= len(frames), f"{shard.what} names a frame that it does not list")
            return Extent(units, frames[frame - 1], shard.varint()) if frame else Extent(units, None, 0)
        extents, left = shard.many(2, extent, SHARD_UNITS), size
        for units, frame, offset in extents:
            demand(units and (units - 1) * unit < left, f"{shard.what} describes more than the file")
            length = min(units * unit, left)
            demand(not frame or offset + length <= frame.length, f"{shard.what} names bytes behind the end of a frame")
            left -= length
        demand(left == 0, f"{shard.what} describes less than the file")
        return extents

    def read_list(self, shards, content):
        entries = []
        for first, reference in shards:
            shard, ids, frames = self.shard(reference, 1, content)
            before = [b""]
            def entry():
                kind, shared = shard.byte(), shard.varint()
                demand(kind <= LARGE_FILE and shared <= len(before[0]), f"{shard.what} has an entry that cannot be")
                path = before[0] = before[0][:shared] + shard.sized()
                return self.entry(shard, ids, frames, kind, path)
            found = shard.many(4, entry, SHARD_ENTRIES)
            shard.end()
            demand(found and found[0].path == first, f"{shard.what} begins with another path")
            entries += found
        paths = [entry.path.split(b"/") for entry in entries] # which compare as the order of paths wants it
        demand(all(a < b for a, b in zip(paths, paths[1:])), "the entries of a list are out of order")
        return entries

    def entry(self, shard, ids, frames, kind, path):
        names = path.split(b"/")
        good = all(1 <= len(name) <= 255 and name not in (b".", b"..") for name in names)
        demand(good and len(path) <= 4096 and len(names) <= 64 and b"\0" not in path, f"{path!r} is no good path")
        mode = shard.varint()
        demand(mode <= 0o7777, f"{path!r} has the mode {mode:o}")
        if kind == DIRECTORY:
            return Entry(kind, path, mode)
        if kind == LINK:
            target = shard.sized()
            demand(b"\0" not in target, f"{path!r} points nowhere")
            return Entry(kind, path, mode, target)
        size, *_times_and_inode = (shard.varint() for _ in range(6))
        _racy, unit = shard.byte(), shard.varint()
        demand(unit in (8 * KIB, 16 * KIB, 32 * KIB), f"{path!r} has units of {unit} bytes")
        if kind == FILE:
            demand(size <= INLINE_UNITS * unit, f"{path!r} is too large for an entry without shards")
            return Entry(kind, path, mode, b"", size, unit, self.extents(shard, frames, size, unit))
        references, units = shard.many(9, lambda: self.reference(shard, ids)), -(-size // unit)
        sizes = [min(SHARD_UNITS, units - done) for done in range(0, units, SHARD_UNITS)]
        demand([reference.units for reference in references] == sizes, f"{path!r} has other shards than its size wants")
        return Entry(kind, path, mode, b"", size, unit, (), references)

    def pieces(self, entry, content):
        """The extents of a file; those in shards of its own are read a shard at a time."""
        yield from entry.extents
        left = entry.size
        for reference in entry.shards:
            shard, _ids, frames = self.shard(reference, 2, content)
            size = min(left, SHARD_UNITS * entry.unit)
            extents = self.extents(shard, frames, size, entry.unit)
            shard.end()
            yield from extents
            left -= size

    def restore(self, directory):
        """Directories, files and links; then what makes the tree look complete; at last the modes of directories (9).

        Every name lies in a directory that is made here and not there twice, so none is reached through a link."""
        wal, directories, others = [entry._replace(path=b"pg_wal/" + entry.path) for entry in self.wal], {b""}, set()
        if wal and not any(entry.path == b"pg_wal" for entry in self.entries):
            wal.insert(0, Entry(DIRECTORY, b"pg_wal", 0o700))
        for entry in self.entries + wal + self.late:
            demand(entry.path.rpartition(b"/")[0] in directories, f"{entry.path!r} lies in nothing that is a directory")
            demand(entry.path not in directories and entry.path not in others, f"{entry.path!r} is there twice")
            (directories if entry.kind == DIRECTORY else others).add(entry.path)
        os.mkdir(directory, 0o700)
        root = os.path.join(os.fsencode(directory), b"")
        for entries, content in (self.entries, CONTENT), (wal, WAL), (self.late, CONTENT):
            if entries is self.late:
                subprocess.run(["sync", "-f", directory], check=True)
            for entry in sorted(entries, key=lambda entry: entry.kind == LINK):
                if entry.kind == DIRECTORY:
                    os.mkdir(root + entry.path, 0o700)
                elif entry.kind == LINK:
                    os.symlink(entry.target, root + entry.path)
                else:
                    self.write(root + entry.path, entry, content)
        for entry in reversed([entry for entry in self.entries + self.late if entry.kind == DIRECTORY]):
            os.chmod(root + entry.path, entry.mode)
        subprocess.run(["sync", "-f", directory], check=True)

    def write(self, path, entry, content):
        with open(path, "xb") as file:
            for units, frame, offset in self.pieces(entry, content):
                length = min(units * entry.unit, entry.size - file.tell())
                if frame:
                    file.write(self.open_frame(frame)[offset : offset + length])
                else:
                    file.seek(length, os.SEEK_CUR)
            file.truncate(entry.size)
        os.chmod(path, entry.mode)


def main(verb, root, key_file, wanted=None, directory=None):
    repository = Repository(root, key_file)
    found = list(repository.attempts())
    if verb == "list":
        for lineage, identity, attempt, verdict in found:
            print(identity["cluster"], lineage, attempt, verdict["verdict"] if verdict else "open")
        return
    demand(verb == "restore" and directory, f"{verb} with these arguments is nothing this reader can do")
    backups = [(lineage, attempt, verdict) for lineage, _, attempt, verdict in found if str(attempt) == wanted]
    demand(len(backups) == 1, f"there is no backup {wanted}")
    Backup(repository, *backups[0]).restore(directory)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) in (4, 6) else sys.exit(__doc__)
    except (Damaged, OSError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"failed: {type(error).__name__}: {error}")
