# Overrides of deepPriorCoadd for LSSTCam: the planes that obs_lsst adds to those that cell coadds leave out.

config.bad_mask_planes.extend(["PARTLY_VIGNETTED", "SPIKE"])
