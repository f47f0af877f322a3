"""What drivers run by a machine's POSIX shell, where no program of PostgreSQL does it.

A server's processes are those whose working directory is its data directory, as in
:mod:`sqlroute.local.processes`: found also when the postmaster was killed and left orphans, never
another program that has a stale ``postmaster.pid``'s number by now, and never a zombie, which has
no directory. ``-ef`` compares device and inode, so that symbolic links make no difference.
"""

from __future__ import annotations

_FIND = r"""
data=$1; shift
real=$(cd "$data" 2>/dev/null && pwd -P) || real=$data
lead() {
  pid=$(head -n 1 "$data/postmaster.pid" 2>/dev/null)
  [ -n "$pid" ] && [ "/proc/$pid/cwd" -ef "$real" ]
}
alive() {
  ls -l /proc/[0-9]*/cwd 2>/dev/null | awk -v want="cwd -> $real" '
    substr($0, length($0) - length(want) + 1) == want {
      sub(".*/proc/", ""); sub("/cwd.*", ""); print }' |
  while read -r found; do
    if [ "$(cat "/proc/$found/comm" 2>/dev/null)" = postgres ]; then echo "$found"; fi
  done
}
end_all() {
  while found=$(alive); [ -n "$found" ]; do
    kill -KILL $found 2>/dev/null; sleep 0.01
  done
}
"""

# In one go, since what a helper container starts ends with it.
RECOVER = r"""
pg_ctl=$1 data=$2 log=$3 options=$4 seconds=$5
"$pg_ctl" start -D "$data" -l "$log" -o "$options" -s -w -t "$seconds" &&
"$pg_ctl" stop -D "$data" -m fast -s -w -t "$seconds"
"""

STATUS = (
    _FIND
    + r"""
if lead; then sed -n 8p "$data/postmaster.pid"
elif [ -n "$(alive)" ]; then echo orphans; fi
"""
)
"""Prints the postmaster's status line, or ``orphans``; nothing where all are gone."""

STOP = (
    _FIND
    + r"""
if lead; then
  kill -INT "$pid" || exit 1
  while [ "/proc/$pid/cwd" -ef "$real" ]; do sleep 0.005; done
fi
while [ -n "$(alive)" ]; do sleep 0.01; done
"""
)

INTERRUPT = _FIND + 'if lead; then kill -INT "$pid"; fi\n'

KILL = _FIND + "end_all\n"

CLEAR = _FIND + 'lead && exit 3\nend_all\nrm -f "$data/postmaster.pid"\n'
"""Removes what a crash has left; exit code 3 where the server runs."""

READ = '[ -e "$1" ] || exit 44\nexec cat -- "$1"\n'

WRITE = r"""
umask 077
cat > "$1.new" || exit 1
sync "$1.new" 2>/dev/null
mv -f -- "$1.new" "$1"
"""

TAIL = r"""
if [ "$2" = size ]; then wc -c < "$1" 2>/dev/null || echo 0; else tail -c "+$2" "$1" 2>/dev/null; fi
"""

STANDBY = r"""
umask 077
: > "$1/standby.signal" && rm -f "$1/recovery.signal" "$1/recovery.conf" "$1/promote"
"""

_SETTINGS = "postgresql.conf postgresql.auto.conf pg_hba.conf pg_ident.conf"

# Kept where they are: those of a rewind that was interrupted, since by now the data directory may
# have the source's.
KEEP_SETTINGS = rf"""
umask 077
[ -d "$1.settings" ] && exit 0
rm -rf "$1.settings.new"; mkdir "$1.settings.new" || exit 1
for file in {_SETTINGS}; do
  if [ -e "$1/$file" ]; then cp -p "$1/$file" "$1.settings.new/" || exit 1; fi
done
mv "$1.settings.new" "$1.settings"
"""

GIVE_SETTINGS_BACK = rf"""
for file in {_SETTINGS}; do
  if [ -e "$1.settings/$file" ]; then
    cp -p "$1.settings/$file" "$1/$file.new" && mv -f "$1/$file.new" "$1/$file" || exit 1
  fi
done
rm -rf "$1.settings"
"""

FORGET_SETTINGS = 'rm -rf "$1.settings"\n'

# Prints where to build: a neighbour of the data directory, or the directory itself where it is
# empty and cannot be removed, as a mount point.
ROOM = r"""
data=$1 work=$2 replace=$3
rm -rf "$work" || exit 1
if [ -n "$(ls -A "$data" 2>/dev/null)" ]; then
  [ "$replace" = yes ] || exit 17
  if [ "$(stat -c %d "$data")" != "$(stat -c %d "$data/..")" ]; then exit 18; fi
elif [ -d "$data" ] && ! rmdir "$data" 2>/dev/null; then work=$data
fi
printf %s "$work"
"""

# Gives a copy the settings of the directory that it will replace, and makes it a standby.
CARRY = rf"""
data=$1 work=$2
if [ "$work" != "$data" ]; then
  for file in {_SETTINGS}; do
    if [ -e "$data/$file" ]; then cp -p "$data/$file" "$work/$file" || exit 1; fi
  done
fi
umask 077
: > "$work/standby.signal" && rm -f "$work/recovery.signal"
"""

SWAP = r"""
data=$1 work=$2 before=$3
[ "$work" = "$data" ] && exit 0
sync "$work" 2>/dev/null
if [ -e "$data" ]; then mv -- "$data" "$before" || exit 1; fi
mv -- "$work" "$data" || { [ -e "$before" ] && mv -- "$before" "$data"; exit 1; }
"""

CLEAN_UP = r"""
if [ "$1" = "$2" ]; then find "$1" -mindepth 1 -delete; else rm -rf "$2"; fi
"""
