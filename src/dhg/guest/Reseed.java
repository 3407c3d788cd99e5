import java.lang.reflect.Field;
import java.util.Random;
import java.util.concurrent.atomic.AtomicLong;
import java.util.function.LongConsumer;
import sun.misc.Unsafe;

/**
 * Gives every random number generator of the JVM that lives in its static state a new seed. A restored VM is a clone: without
 * this, each would draw the same numbers. Field names are those of OpenJDK 17 to 21; one that is missing is an error, and
 * the VM is not used.
 */
public final class Reseed implements LongConsumer {
    private final Unsafe unsafe;
    private final Thread[] threads;
    private final long threadSeed;
    private final AtomicLong[] seeders;
    private final Random[] randoms;
    private final Object secure;
    private final long secureBuffered;

    public Reseed() throws Exception {
        Field theUnsafe = Unsafe.class.getDeclaredField("theUnsafe");
        theUnsafe.setAccessible(true);
        unsafe = (Unsafe) theUnsafe.get(null);
        // Each thread that has used ThreadLocalRandom has its seed; one that has not takes the next of `seeder`.
        threadSeed = unsafe.objectFieldOffset(Thread.class.getDeclaredField("threadLocalRandomSeed"));
        seeders = new AtomicLong[] {
            (AtomicLong) statics("java.util.concurrent.ThreadLocalRandom", "seeder"),
            (AtomicLong) statics("java.util.Random", "seedUniquifier"),
            (AtomicLong) statics("java.util.SplittableRandom", "defaultGen"),
        };
        Math.random();
        java.util.Collections.shuffle(new java.util.ArrayList<>(java.util.List.of(1, 2)));
        randoms = new Random[] {
            (Random) statics("java.lang.Math$RandomNumberGeneratorHolder", "randomNumberGenerator"),
            (Random) statics("java.util.Collections", "r"),
        };
        // NativePRNG mixes /dev/urandom with a generator of its own, but reads ahead: what it has read must go.
        new java.security.SecureRandom().nextInt();
        secure = statics("sun.security.provider.NativePRNG", "INSTANCE");
        secureBuffered = unsafe.objectFieldOffset(secure.getClass().getDeclaredField("buffered"));
        ThreadGroup root = Thread.currentThread().getThreadGroup();
        while (root.getParent() != null) {
            root = root.getParent();
        }
        Thread[] all = new Thread[root.activeCount() * 2 + 16];
        int count = root.enumerate(all, true);
        threads = java.util.Arrays.copyOf(all, count);
    }

    private Object statics(String type, String name) throws Exception {
        Field field = Class.forName(type).getDeclaredField(name);
        return unsafe.getObject(unsafe.staticFieldBase(field), unsafe.staticFieldOffset(field));
    }

    @Override
    public void accept(long seed) {
        for (Thread thread : threads) {
            seed = next(seed);
            unsafe.putLong(thread, threadSeed, seed);
        }
        for (AtomicLong seeder : seeders) {
            seed = next(seed);
            seeder.set(seed);
        }
        for (Random random : randoms) {
            seed = next(seed);
            random.setSeed(seed);
        }
        unsafe.putIntVolatile(secure, secureBuffered, 0);
    }

    /** SplitMix64 without its state: the golden ratio, then Stafford's mix 13. */
    private static long next(long seed) {
        seed += 0x9e3779b97f4a7c15L;
        seed = (seed ^ (seed >>> 30)) * 0xbf58476d1ce4e5b9L;
        seed = (seed ^ (seed >>> 27)) * 0x94d049bb133111ebL;
        return seed ^ (seed >>> 31);
    }
}
