#!/usr/bin/env bash
# A coordinator and three hospitals on this machine, from nothing to a finished run. Every step is a command that people
# type; at a real federation each is typed at another desk. All of it goes into the folder DIR, which is made.
#
#   docs/quickstart.sh [DIR]      DIR is ./quickstart unless told; the port is 8443 unless PORT says another
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
plan=$root/configs/plans/quickstart.yaml
hospitals="north riverside st-anne"
export PATH="$root/.venv/bin:$PATH"
mkdir -p "${1:-quickstart}" && cd "${1:-quickstart}"
export LOCUM_SERVER_HOME=$PWD/coordinator

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
step() { printf '\n--- %3d s  %s\n' $((SECONDS - began)) "$1"; }
patiently() { # what another desk must do first is tried again for two minutes
  local said=said.$BASHPID
  for _ in {1..120}; do "$@" >"$said" 2>&1 && rm "$said" && return; sleep 1; done
  cat "$said" >&2; return 1
}

began=$SECONDS
step "The ML team tries its plan on one machine. That leaves three emulated hospitals with folders of DICOM."
locum simulate "$plan" --sites 3 --out simulated
simulated=$SECONDS; began=$SECONDS

step "The coordinator begins a federation, starts, and invites three hospitals."
locum server init --name quickstart --host localhost --listen 127.0.0.1 --port "${PORT:-8443}"
locum server start >coordinator.log 2>&1 &
for name in $hospitals; do locum server invite "$name"; done

step "The ML team proposes the plan. Meanwhile the hospitals go on."
locum propose "$plan" >proposed &
proposing=$!
digest=$(locum plan digest "$plan")

step "Each hospital joins, ingests its images, and starts its agent; what they say is in NAME.log."
hospital() {
  patiently locum site enrol "$1.invitation.json" --home "$1"
  locum site ingest "simulated/sites/$1/raw/site.yaml" --store "$1/store"
  echo "resources: {threads: 1}" >>"$1/site.yaml" # they share this machine's processor
  exec locum site start --home "$1"
}
for name in $hospitals; do hospital "$name" >"$name.log" 2>&1 & done

wait $proposing
cat proposed

step "At each hospital a steward reviews and approves it, as soon as the agent has it."
steward() {
  patiently locum site review "$digest" --home "$1"
  locum site approve "$digest" --home "$1" --steward "steward of $1" --yes
}
deciding=()
for name in $hospitals; do steward "$name" & deciding+=($!); done
for one in "${deciding[@]}"; do wait "$one"; done

step "The ML team runs it, and fetches what came out."
patiently locum run "$digest"
locum watch
run=$(basename coordinator/runs/*-quickstart-*)
locum pull "$run" --out result

printf '\n%d s from "locum server init" to the result; the simulation before it took %d s\n' \
  $((SECONDS - simulated)) "$simulated"
