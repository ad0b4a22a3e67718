//! Elements as bytes and as numbers.

use std::ffi::c_int;

pub(crate) fn size_of(dtype: c_int) -> usize {
    match dtype {
        0 | 1 => 1,
        2 | 3 | 7 => 4,
        4 | 5 | 8 => 8,
        6 | 9 => 2,
        _ => 0,
    }
}

/// An element as a float and as a whole number.
pub(crate) fn number_of(dtype: c_int, bytes: &[u8]) -> (f64, i64) {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let raw = u64::from_le_bytes(wide);
    match dtype {
        1 => (raw as f64, raw as i64),
        2 => (f64::from(raw as u32 as i32), i64::from(raw as u32 as i32)),
        4 => (raw as i64 as f64, raw as i64),
        6 => (half_to_f64(raw as u16), 0),
        7 => (f64::from(f32::from_bits(raw as u32)), 0),
        8 => (f64::from_bits(raw), 0),
        9 => (f64::from(f32::from_bits((raw as u32) << 16)), 0),
        _ => (0.0, 0),
    }
}

pub(crate) fn bytes_of(dtype: c_int, x: f64, n: i64) -> Vec<u8> {
    match dtype {
        1 => vec![n as u8],
        2 => (n as i32).to_le_bytes().to_vec(),
        4 => n.to_le_bytes().to_vec(),
        6 => f64_to_half(x).to_le_bytes().to_vec(),
        7 => (x as f32).to_le_bytes().to_vec(),
        8 => x.to_le_bytes().to_vec(),
        _ => {
            let bits = (x as f32).to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            ((rounded >> 16) as u16).to_le_bytes().to_vec()
        }
    }
}

pub(crate) fn half_to_f64(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    sign * match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2_f64.powi(exponent - 25),
    }
}

/// The nearest half, ties to even: the last of those below, or the next.
pub(crate) fn f64_to_half(x: f64) -> u16 {
    let sign = if x.is_sign_negative() { 0x8000 } else { 0 };
    let size = x.abs();
    if size.is_nan() {
        return sign | 0x7e00;
    }
    if size >= 65520.0 {
        return sign | 0x7c00;
    }
    let (mut low, mut high) = (0_u16, 0x7c00_u16);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if half_to_f64(middle) <= size {
            low = middle
        } else {
            high = middle
        }
    }
    let (below, above) = (
        size - half_to_f64(low),
        if high == 0x7c00 { 65536.0 - size } else { half_to_f64(high) - size },
    );
    let up = above < below || (above == below && low % 2 == 1);
    sign | if up { high } else { low }
}
