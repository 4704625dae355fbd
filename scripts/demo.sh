#!/usr/bin/env bash
# The main job on the embedded playground: align a tiny SDXL with Diffusion-DPO, then show what
# changed, as an image grid and as a win rate with its interval.
#   bash scripts/demo.sh [key.path=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""
exec diffalign demo "$@"
