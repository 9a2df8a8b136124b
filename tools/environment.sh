# Sourced by demo.sh and test.sh: makes .venv in the checkout and installs the project into it. Safe to run again.

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# ensure_environment EXTRAS: .venv with the project (editable) and these extras, e.g. "demo,dev"
ensure_environment() {
  local extras=$1 root python version free stamp wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cd "$root" || exit 1
  python=${PYTHON:-python3}
  if [ ! -x .venv/bin/python ]; then
    command -v "$python" >/dev/null || fail "no '$python' here; set PYTHON=/path/to/python3.10 (3.10 to 3.13)"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "'$python' does not run"
    case $version in
      3.10 | 3.11 | 3.12 | 3.13) ;;
      *) fail "$python is Python $version; 3.10, 3.11, 3.12 or 3.13 is needed: set PYTHON=/path/to/one" ;;
    esac
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 8 ] || fail "$free GiB free in $root; the environment needs about 6 GB, and room to unpack: 8 GiB"
    say "making .venv with Python $version"
    "$python" -m venv .venv || fail "cannot make .venv; on Debian and Ubuntu: apt install python3-venv"
  fi
  # nothing to install while the project's requirements and the extras are those of the last time
  wanted=$( (cat pyproject.toml && printf '%s' "$extras") | cksum)
  stamp=.venv/.installed-$(printf '%s' "$extras" | tr -c 'a-z' '-')
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "installing mmcl[$extras] into .venv (first time: about 6 GB, a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || fail "installation failed; what pip said is above"
    case ",$extras," in
      *,dev,*) # small pretrained weights; its pins are of another age
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "aisfx==0.1.2" || fail "aisfx: what pip said is above" ;;
    esac
    printf '%s' "$wanted" >"$stamp"
  fi
}
