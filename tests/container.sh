#!/usr/bin/env bash
# Test the image and the compose file on a machine that cannot pull images. The base image is built from Debian packages
# and tagged python:3.11-slim. Prometheus and Alertmanager are the programs of Debian, tagged with the names in
# docker-compose.yml. Grafana and PostgreSQL cannot be replaced in this way, so they are not tested. Needs root.
#
#   bash tests/container.sh        exit code 0: all checks passed; 1: one failed; 77: not run, with the reason
#
# Images, containers and networks are in a temporary folder, and the network is in a separate namespace. Both are removed.
set -euo pipefail
cd "$(dirname "$0")/.."
MAX_MB=400
COMPOSE=podman-compose==1.6.0

skip() { echo "container.sh: NOT RUN: $1" >&2; exit 77; }
fail() { echo "container.sh: FAILED: $1" >&2; exit 1; }
pass() { echo "container.sh: passed: $1"; }

prepare() { # check the tools, and put all files of podman below one folder
    [ "$(id -u)" = 0 ] || skip "it needs root"
    for program in podman buildah runc mmdebstrap unshare ip iptables curl prometheus promtool prometheus-alertmanager amtool; do
        command -v "$program" >/dev/null || skip "no $program (Debian: podman buildah runc netavark aardvark-dns iptables iproute2 mmdebstrap curl prometheus prometheus-alertmanager)"
    done
    python3 -m venv "$work/venv" && "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$COMPOSE" 2>"$work/log" ||
        skip "no $COMPOSE: $(tail -1 "$work/log")"
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

build() { # the only step that needs a network: Debian packages for the base, Python packages for the image
    # Like python:3.11-slim, the base has no documents, and no usrmerge, which depends on perl.
    local lean=(--variant=minbase --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr) folder
    lean+=('--setup-hook=printf "Package: usrmerge\nPin: release *\nPin-Priority: -1\n" >"$1/etc/apt/preferences.d/lean"')
    for folder in doc man locale; do lean+=("--dpkgopt=path-exclude=/usr/share/$folder/*"); done
    [ -e "$work/base/base.tar" ] || {
        mkdir -p "$work/base"
        timeout 900 mmdebstrap "${lean[@]}" --include=python3.11-venv,ca-certificates,usr-is-merged bookworm "$work/base/base.tar" \
            >"$work/log" 2>&1 || { rm -f "$work/base/base.tar"; skip "no base system: $(tail -1 "$work/log")"; }
    }
    image python:3.11-slim "$work/base" <<END
FROM scratch
ADD base.tar /
RUN ln -s /usr/bin/python3.11 /usr/local/bin/python \
    && mkdir -p /usr/local/lib/python3.11/site-packages/pip /usr/local/lib/python3.11/ensurepip \
    && touch /usr/local/bin/pip # where python:3.11-slim has them
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
    local outside=() path # the package configuration of this machine, mounted for the build only
    for path in /etc/ssl/certs /etc/pip.conf; do [ -e $path ] && outside+=(-v "$path:$path:ro"); done
    buildah build "${how[@]}" "${outside[@]}" -t engine-health:0.1.0 . >"$work/log" 2>&1 || { tail -20 "$work/log"; fail "the image does not build"; }
    pass "the Dockerfile builds unchanged"
}

how=(--isolation chroot --format docker --pull-never --layers)
image() { buildah build "${how[@]}" -t "$1" -f - "$2" >"$work/log" 2>&1 || { tail -20 "$work/log"; skip "no stand-in for $1"; }; }
named() { sed -n "s/^ *image: \(.*$1:.*\)/\1/p" docker-compose.yml | head -1; }

inspect() { # check size, label, owners and content of the image
    local size actual
    size=$(($(podman image inspect engine-health:0.1.0 --format '{{.Size}}') / 1000000))
    [ $size -le $MAX_MB ] || fail "the image has $size MB, expected at most $MAX_MB"
    pass "the image has $size MB including the Debian base, at most $MAX_MB"
    actual=$(podman image inspect engine-health:0.1.0 --format '{{index .Config.Labels "engine-health.model.digest"}}')
    [ "$actual" = "$(sha256sum <model/artefact/engine-health.onnx | cut -d' ' -f1)" ] || fail "label engine-health.model.digest: $actual"
    pass "the label is the digest of the artefact"
    actual=$(mount=$(podman image mount engine-health:0.1.0); cd "$mount"
        find . -user 10001 -o -group 10001 -o -perm -0002 -type f | sort | tr '\n' ' '
        find opt usr/local \( -name torch -o -name pip -o -name ensurepip -o -name '*.pt' \) | tr '\n' ' '
        podman image unmount engine-health:0.1.0 >/dev/null)
    [ "$actual" = "./data " ] || fail "files in the image: $actual, expected only ./data"
    pass "only /data belongs to the user of the image; it contains no torch, no pip and no checkpoint"
}

compose() { "$work/venv/bin/podman-compose" -p "$project" "$@" >>"$work/compose.log" 2>&1; }
in_service() { podman exec "$(podman ps -q --filter "label=com.docker.compose.service=engine-health")" "$@"; }
ask() { curl -s --max-time 10 "$@"; }
until_true() { # repeat a command until it succeeds, at most 90 s
    for _ in $(seq 180); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done
    tail -30 "$work/compose.log"; podman ps -a; fail "not true within 90 s: $*"
}
ready() { [ "$(ask -o /dev/null -w '%{http_code}' "$here/readyz" || true)" = 200 ]; }
prometheus_returns() { [ "$(ask "http://127.0.0.1:9090/api/v1/query" --data-urlencode "query=$1" | sed -n 's/.*,"\(.*\)"\]}\]}}/\1/p')" = "$2" ]; }
has_alertmanager() { ask http://127.0.0.1:9090/api/v1/alertmanagers | grep -q '"activeAlertmanagers":\[{"url":"http://alertmanager:9093/'; }
here=http://127.0.0.1:8000

run() { # run the compose file in a separate network
    ip link set lo up
    trap 'compose --profile demo down -v || true' EXIT
    compose up -d engine-health prometheus alertmanager || { tail -30 "$work/compose.log"; fail "compose up"; }
    until_true ready
    pass "ready"

    local request response
    request=$(python3 -c "import re; print(re.search(r\"v1/predict.*? -d '(.*?)'\", open('README.md').read(), re.DOTALL)[1])")
    response=$(ask "$here/v1/predict" -H 'Content-Type: application/json' -d "$request")
    [[ $response == *'"health":"'* && $response == *'"prediction_id":"'* ]] || fail "the request of the README returned: $response"
    pass "the request of the README returns a stored prediction"

    in_service touch /data/can /tmp/can || fail "/data or /tmp is read-only"
    for path in / /opt/engine-health /home; do
        [[ $(in_service touch "$path/cannot" 2>&1) == *"Read-only file system"* ]] || fail "$path is writable, expected a read-only file system"
    done
    pass "the root file system is read-only, /data and /tmp are not"

    response=$(in_service grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/1/status | tr -s '\t\n' ' ')
    [ "$response" = "Uid: 10001 10001 10001 10001 CapEff: 0000000000000000 CapBnd: 0000000000000000 NoNewPrivs: 1 " ] || fail "user or capabilities: $response"
    pass "user 10001, no capabilities, no new privileges"

    local service
    for service in engine-health prometheus alertmanager; do
        until_true podman healthcheck run "$(podman ps -q --filter "label=com.docker.compose.service=$service")"
    done
    pass "the health checks of service, Prometheus and Alertmanager pass"

    until_true prometheus_returns 'up{job="engine-health"}' 1
    until_true prometheus_returns 'sum(engine_health_predictions_total)' 1
    until_true has_alertmanager
    pass "Prometheus scrapes the service and has its Alertmanager"

    drains
    survives
    requires_keys
    simulates
}

drains() { # after SIGTERM: unready while requests are served, then exit code 0
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
    [ $unready -gt 3 ] || fail "after SIGTERM: unready and serving in $unready checks, expected more than 3"
    codes=$(podman inspect "$id" --format '{{.State.ExitCode}}')
    [ "$codes" = 0 ] || fail "exit code $codes after SIGTERM"
    pass "SIGTERM: unready immediately, serving in $unready checks, exit code 0"
}

survives() { # the store remains when its containers are removed
    local after
    compose down || fail "compose down"
    [ -z "$(podman ps -aq)" ] || fail "containers after down: $(podman ps -a)"
    compose up -d engine-health || fail "compose up again"
    until_true ready
    after=$(ask "$here/v1/engines")
    [[ $after == *'"engine_id":"demo-1"'* && $after == *'"total":1'* ]] || fail "after down and up: $after"
    pass "stored data survives down and up"
}

requires_keys() { # secrets are files
    compose down
    echo "test-api-key" >"$work/key" && chmod 644 "$work/key"
    API_KEYS_FILE="$work/key" compose up -d engine-health prometheus || fail "compose up with a key"
    until_true ready
    local variables
    [ "$(ask -o /dev/null -w '%{http_code}' "$here/v1/model")" = 401 ] || fail "a request without a key was not rejected with 401"
    [ "$(ask -o /dev/null -w '%{http_code}' -H 'X-API-Key: test-api-key' "$here/v1/model")" = 200 ] || fail "a request with the key was not accepted"
    variables=$(in_service cat /proc/1/environ | tr '\0' ' ')
    [[ $variables == *ENGINE_HEALTH_PORT=8000* && $variables != *test-api-key* ]] || fail "environment of the service: $variables"
    pass "a key in a file is required, and is in no environment variable"
    until_true prometheus_returns 'sum(engine_health_http_requests_total{status="401"})' 1 # the only 401 is the one above
    pass "Prometheus scrapes the service without a key"
}

many_engines() { [[ $(ask "$here/v1/engines" | sed -n 's/.*"total":\([0-9]*\).*/\1/p') -ge 40 ]]; }
simulates() { # the profile demo sends flights
    compose down -v || fail "compose down -v"
    compose --profile demo up -d engine-health replay || fail "compose up with the fleet"
    until_true many_engines
    pass "profile demo: flights of 40 simulated engines are stored"
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
    [ -n "${CONTAINER_WORK:-}" ] && return # keep the folder, so that a second run is fast
    podman system reset --force >/dev/null 2>&1 || true
    rm -rf "$work" || true
}
trap clean EXIT
prepare
build
inspect
: >"$work/compose.log"
unshare --net -- bash tests/container.sh --inside "$work" || exit $?
echo "container.sh: all checks passed"
