#!/usr/bin/env bash
# Does on a bare Debian 13 (Python 3.13) what a new user types there: an install without
# constraints.txt, so with the newest releases, then the quick start and the tests.
#   scripts/bare_debian.sh [FOLDER]     FOLDER must be empty or new; the default is one in $TMPDIR
# Needs root, debootstrap, git, python3 with pip, 4 GB of disk, and a Debian on which apt and pip
# work: their mirror, package index, proxies and certificates are used inside too. FOLDER is kept:
# the clone is in home/user, and nothing stays mounted. The tests get GOTHIC_MIRROR if it is set.
set -euo pipefail
cd "$(dirname "$0")/.."
root="$(realpath "${1:-$(mktemp -d)}")"
mkdir -p "$root"
chmod 755 "$root" # mktemp's folders are closed to other users
[[ $(id -u) = 0 && -z $(ls -A "$root") ]] || {
    echo "this must run as root, and $root must be empty" >&2
    exit 2
}
mirror="$(apt-get indextargets --format '$(REPO_URI)' \
    'Origin: Debian' 'Label: Debian' 'Created-By: Packages' | sort -u | head -n 1)"
[[ -n $mirror ]] || {
    echo "apt has no lists of a Debian mirror yet: run apt-get update" >&2
    exit 2
}

# Of this machine's environment, only what is needed to reach the package index goes inside: proxies
# and some settings of pip, first those of its files, then those of PIP_* variables, which take
# precedence. Local folders of packages and constraints are left out.
environment=(HOME=/home/user PATH=/usr/sbin:/usr/bin LANG=C.UTF-8)
for name in {http,https,no,HTTP,HTTPS,NO}_{proxy,PROXY}; do
    [[ -z ${!name:-} ]] || environment+=("$name=${!name}")
done
while IFS="=" read -r key value; do
    name="${key##*.}"
    [[ $name =~ ^(index-url|extra-index-url|trusted-host|proxy|(default-)?timeout)$ ]] || continue
    [[ $value != *file:* ]] || continue
    name="PIP_${name//-/_}" value="${value#\'}"
    environment+=("${name^^}=${value%\'}")
done < <(python3 -m pip config list | sort -r)

inside() { # USER COMMAND...
    chroot --userspec="$1:$1" "$root" env --ignore-environment "${environment[@]}" "${@:2}"
}

echo "== debootstrap"
debootstrap --variant=minbase trixie "$root" "$mirror" > /dev/null
trap 'for point in mnt dev sys proc; do
    ! mountpoint --quiet "$root/$point" || umount --recursive "$root/$point"
done' EXIT
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind --make-rslave /dev "$root/dev"
if [[ -n ${GOTHIC_MIRROR:-} ]]; then
    mount --bind -o ro "$GOTHIC_MIRROR" "$root/mnt"
    environment+=(GOTHIC_MIRROR=/mnt)
fi
cp --dereference /etc/resolv.conf /etc/hosts "$root/etc/"
cp --recursive /usr/local/share/ca-certificates "$root/usr/local/share/"
apt-config dump | { grep -E '^Acquire::(https?::|Check-)' || true; } > "$root/etc/apt/apt.conf.d/90host"

echo "== system packages"
# What the README asks for; the venv module, which Debian packages apart (scripts/install.sh does
# without it); and gcc and strace, without which the tests that inject faults skip.
inside root apt-get -qq update
inside root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
    python3 python3-pip python3-venv git gcc libc6-dev strace > /dev/null
inside root useradd --create-home --shell /bin/bash user
git clone --quiet . "$root/home/user/gothic_jax"
inside root chown --recursive user:user /home/user/gothic_jax

inside user bash -euo pipefail -s << 'TYPED'
cd ~/gothic_jax
: > constraints.txt # or the scripts below, which install too, would go back to the pinned versions
python3 -m venv .venv
source .venv/bin/activate
echo "== pip install"
pip install --quiet --editable '.[dev]'
python --version
pip list 2> /dev/null | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|tokenizers|numpy) '
echo "== quick start"
time scripts/quickstart.sh
echo "== tests"
time scripts/test.sh
TYPED
