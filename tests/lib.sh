# shellcheck shell=bash
# What the scripts of this folder share: who runs the tests, where downloads are kept, how to wait and how to stop.

die() { echo "${0##*/}: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }

# PostgreSQL refuses to run as root, so root lends the tests and their services to this user.
TEST_USER=${PGMUSTER_TEST_USER:-postgres}
# shellcheck disable=SC2034 # used where this is sourced
AS_TEST_USER=(setpriv "--reuid=$TEST_USER" "--regid=$TEST_USER" --clear-groups)

# Unpacked programs, shared by all checkouts and readable by the test user.
test_cache() {
  if [ -n "${PGMUSTER_TEST_CACHE:-}" ]; then echo "$PGMUSTER_TEST_CACHE"
  elif is_root; then echo /var/cache/pgmuster-tests
  else echo "${XDG_CACHE_HOME:-$HOME/.cache}/pgmuster-tests"; fi
}

# within SECONDS COMMAND...: repeats the command until it succeeds; fails when the time is over.
within() {
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 0.1; done
}

# marked MARK: the processes with PGMUSTER_TEST_MARK=MARK in their environment, that is, those started with it and
# whatever they started. Unlike a process id in a file, a mark is never somebody else's. grep's own status says
# nothing here: it is an error when any process of the machine ended meanwhile or may not be read.
marked() { { grep -lzxF "PGMUSTER_TEST_MARK=$1" /proc/[0-9]*/environ 2>/dev/null || true; } | cut -d/ -f3; }
