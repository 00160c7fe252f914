#!/bin/sh
# Debian packages that some tests and benchmarks use; without them those tests are skipped and say so.
set -u
missing=""
command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || missing="$missing mosquitto"
command -v bwrap >/dev/null || missing="$missing bubblewrap"
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"
command -v nats-server >/dev/null || [ -x /usr/sbin/nats-server ] || missing="$missing nats-server"
command -v chromium >/dev/null || missing="$missing chromium"
command -v chromedriver >/dev/null || missing="$missing chromium-driver"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing Debian packages for tests:$missing"
  log=$(mktemp)
  apt-get update -qq >"$log" 2>&1
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >>"$log" 2>&1 ||
    { tail -n 5 "$log"; echo "could not install$missing: the tests that use them will be skipped"; }
  rm -f "$log"
else
  echo "for all tests, as root: apt-get install$missing (without them, the tests that use them are skipped)"
fi
exit 0
