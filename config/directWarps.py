# Overrides of deepPriorCoadd for the direct warps of Data Release Production.

config.warp_form = "exposure"
# The same visits and artifact masks as the deep coadd.
config.select_visits = True
config.use_artifact_masks = True
# EDGE marks pixels near the edge of a detector, where nothing is detected. They are good, and Rubin's coadds
# use them.
config.bad_mask_planes.remove("EDGE")
