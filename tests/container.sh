#!/usr/bin/env bash
# The image and the compose file, tried for real where no image can be fetched: the base image is made of Debian's
# packages and tagged python:3.11-slim, Prometheus and Alertmanager are Debian's programs under the names that
# docker-compose.yml gives. Needs root. Grafana's and PostgreSQL's images cannot be had so: their parts are not tried.
#
#   bash tests/container.sh        exit code 0: every promise kept; 1: one broken; 77: it could not be tried, and why
#
# Images, containers and networks are in a folder of their own, the network in a namespace of its own; both go with it.
set -euo pipefail
cd "$(dirname "$0")/.."
MOST_MB=400
COMPOSE=podman-compose==1.6.0

cannot() { echo "container.sh: NOT RUN: $1" >&2; exit 77; }
fail() { echo "container.sh: BROKEN: $1" >&2; exit 1; }
kept() { echo "container.sh: kept: $1"; }

prepare() { # the tools, then everything of podman's below one folder
    [ "$(id -u)" = 0 ] || cannot "it needs root"
    for program in podman buildah runc mmdebstrap unshare ip iptables curl prometheus promtool prometheus-alertmanager amtool; do
        command -v "$program" >/dev/null || cannot "no $program (Debian: podman buildah runc netavark aardvark-dns iptables iproute2 mmdebstrap curl prometheus prometheus-alertmanager)"
    done
    python3 -m venv "$work/venv" && "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$COMPOSE" 2>"$work/log" ||
        cannot "no $COMPOSE: $(tail -1 "$work/log")"
    cat >"$work/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$work/store"
runroot = "$work/run"
END
    cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "$work/networks"
END
}

build() { # what needs the outside: Debian's packages for the base, Python's for the image
    # As lean as python:3.11-slim: no documents, and no usrmerge, which would bring all of perl.
    local lean=(--variant=minbase --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr) folder
    lean+=('--setup-hook=printf "Package: usrmerge\nPin: release *\nPin-Priority: -1\n" >"$1/etc/apt/preferences.d/lean"')
    for folder in doc man locale; do lean+=("--dpkgopt=path-exclude=/usr/share/$folder/*"); done
    [ -e "$work/base/base.tar" ] || {
        mkdir -p "$work/base"
        timeout 900 mmdebstrap "${lean[@]}" --include=python3.11-venv,ca-certificates,usr-is-merged bookworm "$work/base/base.tar" \
            >"$work/log" 2>&1 || { rm -f "$work/base/base.tar"; cannot "no base system: $(tail -1 "$work/log")"; }
    }
    image python:3.11-slim "$work/base" <<END
FROM scratch
ADD base.tar /
RUN ln -s /usr/bin/python3.11 /usr/local/bin/python \
    && mkdir -p /usr/local/lib/python3.11/site-packages/pip /usr/local/lib/python3.11/ensurepip \
    && touch /usr/local/bin/pip # where the base that it stands for has them
END
    cp /usr/bin/prometheus /usr/bin/promtool /usr/bin/prometheus-alertmanager /usr/bin/amtool "$work/base"
    cp /usr/share/prometheus/alertmanager/*.tmpl "$work/base"
    image "$(named prometheus)" "$work/base" <<END
FROM python:3.11-slim
COPY prometheus promtool /bin/
RUN mkdir /prometheus && chown 65534:65534 /prometheus
USER 65534
ENTRYPOINT ["/bin/prometheus"]
END
    image "$(named alertmanager)" "$work/base" <<END
FROM python:3.11-slim
COPY prometheus-alertmanager amtool /bin/
COPY *.tmpl /usr/share/prometheus/alertmanager/
RUN mkdir /alertmanager && chown 65534:65534 /alertmanager
USER 65534
ENTRYPOINT ["/bin/prometheus-alertmanager"]
END
    local outside=() path # how this machine reaches packages, lent to the build and not left in the image
    for path in /etc/ssl/certs /etc/pip.conf; do [ -e $path ] && outside+=(-v "$path:$path:ro"); done
    buildah build "${how[@]}" "${outside[@]}" -t engine-health:0.1.0 . >"$work/log" 2>&1 || { tail -20 "$work/log"; fail "the image does not build"; }
    kept "the Dockerfile builds unchanged"
}

how=(--isolation chroot --format docker --pull-never --layers)
image() { buildah build "${how[@]}" -t "$1" -f - "$2" >"$work/log" 2>&1 || { tail -20 "$work/log"; cannot "no stand-in for $1"; }; }
named() { sed -n "s/^ *image: \(.*$1:.*\)/\1/p" docker-compose.yml | head -1; }

inspect() { # what the image is
    local size found
    size=$(($(podman image inspect engine-health:0.1.0 --format '{{.Size}}') / 1000000))
    [ $size -le $MOST_MB ] || fail "the image has $size MB, more than $MOST_MB"
    kept "the image has $size MB (base of Debian's packages included), no more than $MOST_MB"
    found=$(podman image inspect engine-health:0.1.0 --format '{{index .Config.Labels "engine-health.model.digest"}}')
    [ "$found" = "$(sha256sum <model/artefact/engine-health.onnx | cut -d' ' -f1)" ] || fail "label: $found"
    kept "its label is the artefact's digest"
    found=$(mount=$(podman image mount engine-health:0.1.0); cd "$mount"
        find . -user 10001 -o -group 10001 -o -perm -0002 -type f | sort | tr '\n' ' '
        find opt usr/local \( -name torch -o -name pip -o -name ensurepip -o -name '*.pt' \) | tr '\n' ' '
        podman image unmount engine-health:0.1.0 >/dev/null)
    [ "$found" = "./data " ] || fail "found in the image: $found"
    kept "nothing belongs to its user but /data; no torch, no pip, no checkpoint in it"
}

compose() { "$work/venv/bin/podman-compose" -p "$project" "$@" >>"$work/compose.log" 2>&1; }
in_service() { podman exec "$(podman ps -q --filter "label=com.docker.compose.service=engine-health")" "$@"; }
ask() { curl -s --max-time 10 "$@"; }
until_true() { # until a command succeeds, for a minute and a half
    for _ in $(seq 180); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done
    tail -30 "$work/compose.log"; podman ps -a; fail "never true: $*"
}
ready() { [ "$(ask -o /dev/null -w '%{http_code}' "$here/readyz" || true)" = 200 ]; }
prometheus_says() { [ "$(ask "http://127.0.0.1:9090/api/v1/query" --data-urlencode "query=$1" | sed -n 's/.*,"\(.*\)"\]}\]}}/\1/p')" = "$2" ]; }
knows_alertmanager() { ask http://127.0.0.1:9090/api/v1/alertmanagers | grep -q '"activeAlertmanagers":\[{"url":"http://alertmanager:9093/'; }
here=http://127.0.0.1:8000

run() { # compose, in a network of its own
    ip link set lo up
    trap 'compose --profile demo down -v || true' EXIT
    compose up -d engine-health prometheus alertmanager || { tail -30 "$work/compose.log"; fail "compose up"; }
    until_true ready
    kept "ready"

    local asked answer
    asked=$(python3 -c "import re; print(re.search(r\"v1/predict.*? -d '(.*?)'\", open('README.md').read(), re.DOTALL)[1])")
    answer=$(ask "$here/v1/predict" -H 'Content-Type: application/json' -d "$asked")
    [[ $answer == *'"health":"'* && $answer == *'"prediction_id":"'* ]] || fail "the README's request: $answer"
    kept "predicts and remembers: the README's request is answered"

    in_service touch /data/can /tmp/can || fail "/data and /tmp cannot be written"
    for path in / /opt/engine-health /home; do
        [[ $(in_service touch "$path/cannot" 2>&1) == *"Read-only file system"* ]] || fail "$path can be written"
    done
    kept "the root file system is read-only, /data and /tmp are not"

    answer=$(in_service grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/1/status | tr -s '\t\n' ' ')
    [ "$answer" = "Uid: 10001 10001 10001 10001 CapEff: 0000000000000000 CapBnd: 0000000000000000 NoNewPrivs: 1 " ] || fail "$answer"
    kept "user 10001, no capability, no new privileges"

    local service
    for service in engine-health prometheus alertmanager; do
        until_true podman healthcheck run "$(podman ps -q --filter "label=com.docker.compose.service=$service")"
    done
    kept "the health checks of service, Prometheus and Alertmanager pass"

    until_true prometheus_says 'up{job="engine-health"}' 1
    until_true prometheus_says 'sum(engine_health_predictions_total)' 1
    until_true knows_alertmanager
    kept "Prometheus scrapes it and knows its Alertmanager"

    drains
    survives
    asks_for_keys
    demonstrates
}

drains() { # unready first, and still answering; then the end, exit code 0
    local id codes unready=0
    id=$(podman ps -q --filter "label=com.docker.compose.service=engine-health")
    compose stop engine-health &
    for _ in $(seq 200); do
        codes=$(ask -o /dev/null -w '%{http_code}' "$here/readyz" || true)$(ask -o /dev/null -w ' %{http_code}' "$here/v1/model" || true)
        [ "$codes" = "503 200" ] && unready=$((unready + 1))
        [[ $codes == 000* ]] && break
        sleep 0.1
    done
    wait $!
    [ $unready -gt 3 ] || fail "after SIGTERM: unready and answering $unready times"
    codes=$(podman inspect "$id" --format '{{.State.ExitCode}}')
    [ "$codes" = 0 ] || fail "exit code $codes after SIGTERM"
    kept "SIGTERM: unready at once, $unready times answered meanwhile, exit code 0"
}

survives() { # the memory outlives its containers
    local after
    compose down || fail "compose down"
    [ -z "$(podman ps -aq)" ] || fail "containers after down: $(podman ps -a)"
    compose up -d engine-health || fail "compose up again"
    until_true ready
    after=$(ask "$here/v1/engines")
    [[ $after == *'"engine_id":"demo-1"'* && $after == *'"total":1'* ]] || fail "after down and up: $after"
    kept "what was remembered survives down and up"
}

asks_for_keys() { # secrets are files
    compose down
    echo "a-key-of-this-test" >"$work/key" && chmod 644 "$work/key"
    API_KEYS_FILE="$work/key" compose up -d engine-health prometheus || fail "compose up with a key"
    until_true ready
    local found
    [ "$(ask -o /dev/null -w '%{http_code}' "$here/v1/model")" = 401 ] || fail "answered without a key"
    [ "$(ask -o /dev/null -w '%{http_code}' -H 'X-API-Key: a-key-of-this-test' "$here/v1/model")" = 200 ] || fail "the key opens nothing"
    found=$(in_service cat /proc/1/environ | tr '\0' ' ')
    [[ $found == *ENGINE_HEALTH_PORT=8000* && $found != *a-key-of-this-test* ]] || fail "the environment: $found"
    kept "a key given as a file is asked for, and stands in no environment"
    until_true prometheus_says 'sum(engine_health_http_requests_total{status="401"})' 1 # none was refused before
    kept "Prometheus scrapes it still, without a key"
}

many_engines() { [[ $(ask "$here/v1/engines" | sed -n 's/.*"total":\([0-9]*\).*/\1/p') -ge 40 ]]; }
demonstrates() { # a fleet flies
    compose down -v || fail "compose down -v"
    compose --profile demo up -d engine-health replay || fail "compose up with the fleet"
    until_true many_engines
    kept "profile demo: a simulated fleet of forty engines flies"
}

project=engine-health-test
if [ "${1:-}" = --inside ]; then
    work=$2
    run
    exit
fi
work=${CONTAINER_WORK:-$(mktemp -d /var/tmp/engine-health-container.XXXXXX)}
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf
clean() {
    [ -n "${CONTAINER_WORK:-}" ] && return # kept on demand, so that a second run is quick
    podman system reset --force >/dev/null 2>&1 || true
    rm -rf "$work" || true
}
trap clean EXIT
prepare
build
inspect
: >"$work/compose.log"
unshare --net -- bash tests/container.sh --inside "$work" || exit $?
echo "container.sh: every promise kept"
