#!/usr/bin/env bash
# Score contexts of MIRAGE's multiple-choice questions: the generator is asked for one option, a judge compares meanings.
# Needs and usage: as run.sh.
exec bash "$(dirname "$0")/run.sh" generator.prompt=choice judge=true "$@"
