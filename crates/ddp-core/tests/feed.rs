//! Batches as tensors.

use std::sync::Arc;

use phalanx_comm::testing::run_ranks;
use phalanx_data::{from_fn, Column, DType, LoaderOptions, Order, Samples, Tail};
use phalanx_ddp_core::feed::Feed;
use phalanx_ddp_core::Error;
use tch::{Device, Kind, Tensor};

fn samples(count: u64) -> Arc<dyn Samples> {
    let columns = vec![
        Column::new("image", DType::U8, [3, 2]),
        Column::new("features", DType::F32, [4]),
        Column::new("half", DType::BF16, [2]),
        Column::new("flag", DType::Bool, []),
        Column::new("labels", DType::I64, []),
    ];
    Arc::new(from_fn(count, columns, "v1", |sample, _, row| {
        let byte = u8::try_from(sample.id).expect("small");
        row.column::<u8>(0)?.copy_from_slice(&[byte, 1, 2, 3, 4, 5]);
        row.column::<f32>(1)?.fill(f32::from(byte) / 2.0);
        row.column::<half::bf16>(2)?.fill(half::bf16::from_f32(f32::from(byte)));
        row.column::<u8>(3)?.fill(byte % 2);
        row.column::<i64>(4)?.fill(i64::from(byte));
        Ok(())
    }))
}

fn options() -> LoaderOptions {
    LoaderOptions {
        order: Order::Sequential,
        tail: Tail::Exact,
        epochs: Some(1),
        global_batch: 8,
        rank: 1,
        world_size: 2,
        ..Default::default()
    }
}

#[test]
fn every_column_is_a_tensor_of_its_kind_and_shape() {
    let mut feed = Feed::new(samples(50), options(), Device::Cpu).unwrap();
    let step = feed.next_step().unwrap();
    let batch = &step.micro_batches[0];
    let expected = [
        ("image", Kind::Uint8, vec![4, 3, 2]),
        ("features", Kind::Float, vec![4, 4]),
        ("half", Kind::BFloat16, vec![4, 2]),
        ("flag", Kind::Bool, vec![4]),
        ("labels", Kind::Int64, vec![4]),
    ];
    for ((name, tensor), (own, kind, shape)) in batch.columns().zip(expected) {
        assert_eq!((name, tensor.kind(), tensor.size()), (own, kind, shape));
    }
    let ids = Tensor::from_slice(&[4_i64, 5, 6, 7]);
    assert_eq!(batch.get("labels").unwrap(), &ids);
    assert_eq!(batch.get("flag").unwrap(), &ids.remainder(2).to_kind(Kind::Bool));
    assert_eq!(
        batch.get("features").unwrap(),
        &(ids.unsqueeze(1).expand([4, 4], false) / 2.0).to_kind(Kind::Float)
    );
    let half = ids.unsqueeze(1).expand([4, 2], false).to_kind(Kind::BFloat16);
    assert_eq!(batch.get("half").unwrap(), &half);
    let image = Vec::<i64>::try_from(
        &batch.get("image").unwrap().get(1).flatten(0, 1).to_kind(Kind::Int64),
    );
    assert_eq!(image.unwrap(), [5, 1, 2, 3, 4, 5]);
    assert_eq!(batch.samples()[0].id, 4);
    let error = batch.get("picture").unwrap_err().to_string();
    assert!(error.contains("no column `picture`") && error.contains("features"), "{error}");
}

#[test]
fn a_tensor_stays_as_it_is_when_its_memory_is_used_again() {
    let mut feed = Feed::new(samples(50), options(), Device::Cpu).unwrap();
    let first = feed.next_step().unwrap().micro_batches[0].get("labels").unwrap().shallow_clone();
    for _ in 0..5 {
        drop(feed.next_step().unwrap());
    }
    drop(feed);
    assert_eq!(Vec::<i64>::try_from(&first).unwrap(), [4, 5, 6, 7]);
}

#[test]
fn what_is_done_to_a_tensor_stays_in_it() {
    let mut feed = Feed::new(samples(50), options(), Device::Cpu).unwrap();
    let step = feed.next_step().unwrap();
    let batch = &step.micro_batches[0];
    drop(batch.get("labels").unwrap().shallow_clone().fill_(-1));
    assert_eq!(batch.get("labels").unwrap(), &Tensor::from_slice(&[-1_i64; 4]));
    let feature = batch.get("features").unwrap().double_value(&[1, 3]);
    assert!((feature - 2.5).abs() < 1e-12, "{feature}");
    let next = feed.next_step().unwrap();
    let labels = Vec::<i64>::try_from(next.micro_batches[0].get("labels").unwrap());
    assert_eq!(labels.unwrap(), [12, 13, 14, 15]);
}

#[test]
fn a_feed_ends_resumes_and_weighs() {
    let mut feed = Feed::new(samples(50), options(), Device::Cpu).unwrap();
    let mut all = Vec::new();
    let mut middle = None;
    while !feed.is_at_end() {
        let step = feed.next_step().unwrap();
        // The last two samples are one for each rank.
        assert!((step.weight - 1.0).abs() < 1e-12);
        all.push(step.micro_batches[0].samples().to_vec());
        if all.len() == 3 {
            middle = Some(feed.state());
        }
    }
    assert_eq!(all.len(), 7);
    assert!(matches!(feed.next_step(), Err(Error::Data(phalanx_data::Error::EndOfData { .. }))));
    let mut resumed = Feed::resume(samples(50), options(), &middle.unwrap(), Device::Cpu).unwrap();
    assert_eq!(resumed.next_step().unwrap().micro_batches[0].samples(), all[3]);
}

#[test]
fn unsigned_columns_are_wide_numbers() {
    let columns = vec![Column::new("short", DType::U16, [2]), Column::new("long", DType::U32, [])];
    let samples = Arc::new(from_fn(50, columns, "v1", |sample, _, row| {
        let id = u16::try_from(sample.id).expect("small");
        row.column::<u16>(0)?.copy_from_slice(&[id, u16::MAX - id]);
        row.column::<u32>(1)?.fill(u32::MAX - u32::from(id));
        Ok(())
    }));
    let mut feed = Feed::new(samples, options(), Device::Cpu).unwrap();
    let step = feed.next_step().unwrap();
    let batch = &step.micro_batches[0];
    let numbers = |name: &str| {
        let tensor = batch.get(name).unwrap();
        assert_eq!(tensor.kind(), Kind::Int64);
        Vec::<i64>::try_from(tensor.flatten(0, -1)).unwrap()
    };
    assert_eq!(numbers("short"), [4, 65_531, 5, 65_530, 6, 65_529, 7, 65_528]);
    assert_eq!(numbers("long"), [4, 5, 6, 7].map(|id| i64::from(u32::MAX) - id));
    assert_eq!(batch.get("short").unwrap().size(), [4, 2]);
}

#[test]
fn ranks_agree_on_their_data_or_all_say_the_same() {
    for world_size in [2, 3] {
        let verdicts = |odd: Option<LoaderOptions>| {
            run_ranks(world_size, move |mut group| {
                let rank = group.rank();
                let mut options = match &odd {
                    Some(odd) if rank + 1 == world_size => odd.clone(),
                    _ => options(),
                };
                (options.rank, options.world_size) = (rank, world_size);
                let feed = Feed::new(samples(50), options, Device::Cpu).unwrap();
                let verdict = feed.agree(&mut group).map_err(|error| error.to_string());
                // The group is as good as it was.
                group.barrier().unwrap().wait().unwrap();
                verdict
            })
        };
        assert!(verdicts(None).iter().all(Result::is_ok));
        let odd = LoaderOptions { seed: 9, ..options() };
        let errors: Vec<String> = verdicts(Some(odd)).into_iter().map(Result::unwrap_err).collect();
        let others = if world_size == 2 { "rank 0 has 0" } else { "ranks 0, 1 have 0" };
        let expected = format!("seed: {others}, rank {} has 9", world_size - 1);
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        assert!(errors[0].contains(&expected), "{}", errors[0]);
    }
}
