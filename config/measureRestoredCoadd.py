# Overrides of measurement tasks for restored coadds: no shear estimates, since the prior moves shapes by an
# amount that depends on the shape and on the noise, which no shear calibration knows.

config.measurement.plugins.names.discard("ext_shapeHSM_HsmShapeRegauss")
