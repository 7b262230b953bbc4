//! Where packets go that bypass the kernel: the answers of its FIB and neighbour tables, cached per worker.
//!
//! The first packet of a destination takes the slow path and asks; later ones find the answer. Only the cache is here;
//! who answers is [`super::resolver`].

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ipsec_common::Reason;
use tokio::sync::mpsc;

use super::prefetch::Places;

/// Destinations that a worker remembers; when there are more, it forgets all and learns again.
const MOST_ENTRIES: usize = 64 * 1024;
/// Lookups that are repeated without searching.
const RECENT: usize = 1 << RECENT_BITS;
const RECENT_BITS: u32 = 14;
/// Seconds after which an answer in use is asked for again. That keeps the neighbour confirmed, which traffic that
/// bypasses the kernel does not.
const REFRESH_SECONDS: u64 = 5;
/// Seconds until a question without an answer is repeated.
const RETRY_SECONDS: u64 = 1;

/// What the kernel is asked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Index of the TUN device that the packet came out of; `None` for an outer packet of our own.
    pub device: Option<u32>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// TOS byte or traffic class without the ECN bits, which policy rules may look at.
    pub tos: u8,
}

impl Key {
    /// Which of the recent lookups may be of this key. Whoever makes two keys meet there only has them searched for.
    fn place(&self) -> usize {
        let number = |address: IpAddr| match address {
            IpAddr::V4(address) => u64::from(address.to_bits()),
            IpAddr::V6(address) => address
                .segments()
                .into_iter()
                .fold(0, |sum: u64, part| sum.rotate_left(13) ^ u64::from(part)),
        };
        // Fibonacci hashing: 2^64 over the golden ratio.
        let spread = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let ends = spread(number(self.source)) ^ number(self.destination).rotate_left(24);
        let rest = u64::from(self.device.unwrap_or_default()) << 8 | u64::from(self.tos);
        (spread(ends ^ rest) >> (u64::BITS - RECENT_BITS)) as usize
    }
}

/// An Ethernet next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the interface whose queue takes the packet: below a VLAN device, where there is one.
    pub ifindex: u32,
    /// Our MAC address.
    pub source: [u8; 6],
    /// The neighbour's MAC address.
    pub destination: [u8; 6],
    /// VLAN id, host byte order.
    pub vlan: Option<u16>,
    /// Longest IP packet in bytes.
    pub mtu: u32,
}

/// The answer to a question: a next hop, or why the packet takes the slow path or is dropped.
pub type Answer = Result<NextHop, Reason>;

/// A question on its way to the resolver.
#[derive(Debug)]
pub struct Question {
    /// What is asked.
    pub key: Key,
    /// Generation of the asker's cache.
    pub generation: u64,
    /// Where the answer goes.
    pub reply: mpsc::Sender<Reply>,
}

/// An answer on its way back.
#[derive(Debug)]
pub struct Reply {
    /// What was asked.
    pub key: Key,
    /// Generation when it was asked; an answer of an older one is worth nothing.
    pub generation: u64,
    /// The answer.
    pub answer: Answer,
}

/// Counts changes of routes, rules, links, addresses and neighbours in use. Everything cached before is void.
#[derive(Clone, Debug, Default)]
pub struct Generation(Arc<AtomicU64>);

impl Generation {
    /// Voids all caches.
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    pub(super) fn current(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// The cache of one worker.
#[derive(Debug)]
pub struct NextHops {
    entries: HashMap<Key, Entry>,
    /// The last lookups, one for each [`Key::place`], because bulk traffic repeats them.
    recent: Box<[Option<Recent>]>,
    generation: u64,
    current: Generation,
    questions: mpsc::Sender<Question>,
    reply: mpsc::Sender<Reply>,
    replies: mpsc::Receiver<Reply>,
}

/// A lookup that was answered.
#[derive(Clone, Copy, Debug)]
struct Recent {
    key: Key,
    hop: NextHop,
    generation: u64,
    /// Second from which on it has to be asked for again.
    until: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    answer: Option<Answer>,
    /// Second in which it was asked last.
    asked: u64,
}

impl NextHops {
    /// An empty cache that asks through `questions`.
    pub fn new(questions: mpsc::Sender<Question>, current: Generation) -> Self {
        let (reply, replies) = mpsc::channel(1024);
        Self {
            entries: HashMap::new(),
            recent: vec![None; RECENT].into(),
            generation: current.current(),
            current,
            questions,
            reply,
            replies,
        }
    }

    /// Takes in what the resolver answered, and forgets everything after a change. To be called before each batch.
    pub fn update(&mut self) {
        let current = self.current.current();
        if current != self.generation {
            self.generation = current;
            self.entries.clear();
        }
        while let Ok(reply) = self.replies.try_recv() {
            if reply.generation == self.generation
                && let Some(entry) = self.entries.get_mut(&reply.key)
            {
                entry.answer = Some(reply.answer);
                self.recent[reply.key.place()] = None;
            }
        }
    }

    /// The next hop, or why there is none; asks the resolver where need be. `now` is in seconds.
    pub fn lookup(&mut self, key: &Key, now: u64) -> Answer {
        let place = key.place();
        if let Some(recent) = &self.recent[place]
            && recent.key == *key
            && recent.generation == self.generation
            && now < recent.until
        {
            return Ok(recent.hop);
        }
        let (answer, asked) = self.find(key, now);
        if let Ok(hop) = answer {
            self.recent[place] = Some(Recent {
                key: *key,
                hop,
                generation: self.generation,
                until: asked + REFRESH_SECONDS,
            });
        }
        answer
    }

    /// Where the memory is that the lookup of that key needs.
    pub fn note_places(&self, key: &Key, places: &mut Places) {
        places.add(&self.recent[key.place()]);
    }

    fn find(&mut self, key: &Key, now: u64) -> (Answer, u64) {
        if let Some(entry) = self.entries.get_mut(key) {
            let patience = match entry.answer {
                Some(Ok(_)) => REFRESH_SECONDS,
                Some(Err(_)) | None => RETRY_SECONDS,
            };
            let due = now.saturating_sub(entry.asked) >= patience;
            if due {
                entry.asked = now;
            }
            let found = (
                entry.answer.unwrap_or(Err(Reason::SlowNextHop)),
                entry.asked,
            );
            if due {
                self.ask(*key);
            }
            return found;
        }
        if self.entries.len() >= MOST_ENTRIES {
            self.entries.clear();
        }
        let entry = Entry {
            answer: None,
            asked: now,
        };
        self.entries.insert(*key, entry);
        self.ask(*key);
        (Err(Reason::SlowNextHop), now)
    }

    /// Asks the resolver; where its queue is full, the question is repeated later.
    fn ask(&self, key: Key) {
        let _ = self.questions.try_send(Question {
            key,
            generation: self.generation,
            reply: self.reply.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOP: NextHop = NextHop {
        ifindex: 3,
        source: [2; 6],
        destination: [4; 6],
        vlan: None,
        mtu: 1500,
    };

    fn key(last: u8) -> Key {
        Key {
            device: Some(9),
            source: [10, 0, 0, 1].into(),
            destination: [10, 1, 0, last].into(),
            tos: 0,
        }
    }

    fn cache() -> (NextHops, mpsc::Receiver<Question>, Generation) {
        let (questions, asked) = mpsc::channel(8);
        let generation = Generation::default();
        (
            NextHops::new(questions, generation.clone()),
            asked,
            generation,
        )
    }

    fn answer(asked: &mut mpsc::Receiver<Question>, answer: Answer) {
        let question = asked.try_recv().expect("a question");
        question
            .reply
            .try_send(Reply {
                key: question.key,
                generation: question.generation,
                answer,
            })
            .unwrap();
    }

    #[test]
    fn the_first_packet_asks_and_later_ones_know() {
        let (mut cache, mut asked, _) = cache();
        assert_eq!(cache.lookup(&key(1), 100), Err(Reason::SlowNextHop));
        assert_eq!(cache.lookup(&key(1), 100), Err(Reason::SlowNextHop));
        answer(&mut asked, Ok(HOP));
        assert!(asked.try_recv().is_err(), "one question is enough");
        cache.update();
        assert_eq!(cache.lookup(&key(1), 101), Ok(HOP));
        assert_eq!(cache.lookup(&key(2), 101), Err(Reason::SlowNextHop));
    }

    #[test]
    fn an_answer_in_use_is_refreshed_and_followed() {
        let (mut cache, mut asked, _) = cache();
        let _ = cache.lookup(&key(1), 100);
        answer(&mut asked, Ok(HOP));
        cache.update();
        assert_eq!(cache.lookup(&key(1), 104), Ok(HOP));
        assert!(asked.try_recv().is_err());
        assert_eq!(
            cache.lookup(&key(1), 105),
            Ok(HOP),
            "the old one serves meanwhile"
        );
        let replaced = NextHop {
            destination: [6; 6],
            ..HOP
        };
        answer(&mut asked, Ok(replaced));
        cache.update();
        assert_eq!(cache.lookup(&key(1), 105), Ok(replaced));
    }

    #[test]
    fn a_change_voids_what_was_learnt_and_what_is_on_its_way() {
        let (mut cache, mut asked, generation) = cache();
        let _ = cache.lookup(&key(1), 100);
        generation.bump();
        answer(&mut asked, Ok(HOP));
        cache.update();
        assert_eq!(cache.lookup(&key(1), 100), Err(Reason::SlowNextHop));
        answer(&mut asked, Ok(HOP));
        cache.update();
        assert_eq!(cache.lookup(&key(1), 100), Ok(HOP));
        generation.bump();
        cache.update();
        assert_eq!(cache.lookup(&key(1), 100), Err(Reason::SlowNextHop));
    }

    #[test]
    fn an_unanswered_question_is_repeated_and_a_refusal_is_kept_for_a_while() {
        let (mut cache, mut asked, _) = cache();
        let _ = cache.lookup(&key(1), 100);
        let _ = asked.try_recv().unwrap();
        let _ = cache.lookup(&key(1), 101);
        answer(&mut asked, Err(Reason::SlowLocal));
        cache.update();
        assert_eq!(cache.lookup(&key(1), 101), Err(Reason::SlowLocal));
        assert!(asked.try_recv().is_err());
        assert_eq!(cache.lookup(&key(1), 102), Err(Reason::SlowLocal));
        assert!(asked.try_recv().is_ok());
    }
}
