"""Remembers runs, sessions, samplers and checkpoint expiries over a restart, in SQLite."""

import contextlib
import json
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    model_id TEXT PRIMARY KEY, session_id TEXT, base_model TEXT NOT NULL, lora_rank INTEGER,
    last_request REAL NOT NULL, user_metadata TEXT
);
CREATE TABLE IF NOT EXISTS sessions (session_id TEXT PRIMARY KEY, created REAL NOT NULL, last_heartbeat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT, base_model TEXT NOT NULL, model_path TEXT
);
CREATE TABLE IF NOT EXISTS expiries (directory TEXT PRIMARY KEY, expires_at REAL NOT NULL);
"""

FLUSH_INTERVAL_S = 1.0
"""So much of what was noted of a run's last request may be lost in a crash."""


class Run(NamedTuple):
    model_id: str
    session_id: str | None
    base_model: str
    lora_rank: int | None
    last_request: float
    user_metadata: dict[str, str] | None


class Sampler(NamedTuple):
    sampler_id: str
    session_id: str | None
    base_model: str
    model_path: str | None


class Store:
    """One connection, used from the event loop alone; each statement is a transaction."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)
        self._touched: dict[str, float] = {}
        self._next_flush = 0.0

    def close(self) -> None:
        self._flush()
        self._db.close()

    def put_run(self, run: Run) -> None:
        metadata = json.dumps(run.user_metadata) if run.user_metadata is not None else None
        self._db.execute("REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?)", (*run[:5], metadata))

    def touch_run(self, model_id: str) -> None:
        """Note the time of a request: at once for who asks here, soon on disk."""
        now = time.time()
        self._touched[model_id] = now
        if now >= self._next_flush:
            self._next_flush = now + FLUSH_INTERVAL_S
            self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk keeps a time from being noted, not training
            times = [(when, model_id) for model_id, when in self._touched.items()]
            self._db.executemany("UPDATE runs SET last_request = ? WHERE model_id = ?", times)
            self._touched.clear()

    def run(self, model_id: str) -> Run | None:
        self._flush()
        row = self._db.execute("SELECT * FROM runs WHERE model_id = ?", (model_id,)).fetchone()
        return _run(row) if row else None

    def runs(self, limit: int, offset: int) -> list[Run]:
        """Latest request first."""
        self._flush()
        rows = self._db.execute("SELECT * FROM runs ORDER BY last_request DESC LIMIT ? OFFSET ?", (limit, offset))
        return [_run(row) for row in rows]

    def run_ids(self, session_id: str | None = None) -> list[str]:
        rows = self._db.execute("SELECT model_id FROM runs WHERE ?1 IS NULL OR session_id = ?1", (session_id,))
        return [row[0] for row in rows]

    def put_session(self, session_id: str) -> None:
        now = time.time()
        self._db.execute("INSERT OR IGNORE INTO sessions VALUES (?, ?, ?)", (session_id, now, now))

    def heartbeat(self, session_id: str) -> bool:
        """Whether there is such a session."""
        cursor = self._db.execute(
            "UPDATE sessions SET last_heartbeat = ? WHERE session_id = ?", (time.time(), session_id)
        )
        return cursor.rowcount > 0

    def sessions(self, limit: int, offset: int) -> list[str]:
        rows = self._db.execute(
            "SELECT session_id FROM sessions ORDER BY created DESC LIMIT ? OFFSET ?", (limit, offset)
        )
        return [row[0] for row in rows]

    def has_session(self, session_id: str) -> bool:
        return bool(self._db.execute("SELECT 1 FROM sessions WHERE session_id = ?", (session_id,)).fetchone())

    def put_sampler(self, sampler: Sampler) -> None:
        self._db.execute("REPLACE INTO samplers VALUES (?, ?, ?, ?)", sampler)

    def sampler(self, sampler_id: str) -> Sampler | None:
        row = self._db.execute("SELECT * FROM samplers WHERE sampler_id = ?", (sampler_id,)).fetchone()
        return Sampler(*row) if row else None

    def sampler_ids(self, session_id: str) -> list[str]:
        rows = self._db.execute("SELECT sampler_id FROM samplers WHERE session_id = ?", (session_id,))
        return [row[0] for row in rows]

    def set_expiry(self, directory: Path, expires_at: float | None) -> None:
        if expires_at is None:
            self._db.execute("DELETE FROM expiries WHERE directory = ?", (str(directory),))
        else:
            self._db.execute("REPLACE INTO expiries VALUES (?, ?)", (str(directory), expires_at))

    def expiry(self, directory: Path) -> float | None:
        row = self._db.execute("SELECT expires_at FROM expiries WHERE directory = ?", (str(directory),)).fetchone()
        return row[0] if row else None

    def expired(self) -> list[Path]:
        rows = self._db.execute("SELECT directory FROM expiries WHERE expires_at <= ?", (time.time(),))
        return [Path(row[0]) for row in rows]


def _run(row: tuple[str, str | None, str, int | None, float, str | None]) -> Run:
    return Run(*row[:5], json.loads(row[5]) if row[5] else None)
