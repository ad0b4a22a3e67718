//! Part of phalanx.
