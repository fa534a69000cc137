# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The pipelines and configs of this package, as ``$COADD_DEEPPRIOR_DIR`` outside EUPS."""
