#!/bin/sh
# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

# Make the environment .starred_venv of starred_runner.py, apart from that of the package: STARRED is under the
# GPL 3 and brings JAX. PYTHON names the interpreter; by default it is that of the .venv of the package.

set -eu
cd "$(dirname "$0")"
"${PYTHON:-../.venv/bin/python}" -m venv .starred_venv
.starred_venv/bin/python -m pip install --quiet --disable-pip-version-check \
    "starred-astro == 1.7.1" "jax == 0.12.0.1" "jaxlib == 0.12.0.1"
