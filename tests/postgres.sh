#!/bin/sh
# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

# A PostgreSQL on the loopback interface, for the tests: without systemd, and as the user postgres if run by root.
#
#     postgres.sh start DIRECTORY PORT    makes DIRECTORY and starts it; postgresql://butler@127.0.0.1:PORT/repo
#     postgres.sh stop DIRECTORY          stops it

command=$1
directory=$2
port=$3

programs=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1)
PATH="${programs:+$programs:}$PATH"
export PATH

as_owner() {
    if [ "$(id -u)" = 0 ]; then
        (cd / && setpriv --reuid=postgres --regid=postgres --clear-groups "$@")
    else
        "$@"
    fi
}

if [ "$command" = stop ]; then
    as_owner pg_ctl -D "$directory/data" -m immediate -w stop >/dev/null
    exit
fi

mkdir "$directory" || exit 1
[ "$(id -u)" = 0 ] && chown postgres "$directory"
as_owner initdb -D "$directory/data" -U butler -A trust --no-sync >"$directory.log" 2>&1 &&
    as_owner pg_ctl -D "$directory/data" -w -l "$directory/server.log" \
        -o "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories=$directory -c fsync=off" \
        start >>"$directory.log" 2>&1 &&
    as_owner createdb -h 127.0.0.1 -p "$port" -U butler repo &&
    as_owner psql -q -h 127.0.0.1 -p "$port" -U butler -c 'CREATE EXTENSION btree_gist' repo && exit 0
cat "$directory.log" "$directory/server.log" >&2
exit 1
