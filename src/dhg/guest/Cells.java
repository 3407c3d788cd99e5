import java.lang.reflect.Field;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.concurrent.atomic.AtomicLong;
import java.util.function.LongUnaryOperator;
import sun.misc.Unsafe;

/**
 * Finds the state of every random number generator of the JVM that lives in its static state or in its threads: each is a cell
 * of eight bytes, a field of an object. Asked by number, so that nothing but longs has to cross over to Python: 4 * n is the
 * reference of cell n's object as the heap stores it, 4 * n + 1 the offset of the field in it, 4 * n + 2 writes a mark into the
 * field and returns it, 4 * n + 3 returns the field. -1 is the number of cells.
 *
 * Field names are those of OpenJDK 17 to 21; one that is missing is an error, and there will be no snapshot.
 */
public final class Cells implements LongUnaryOperator {
    private final Unsafe unsafe;
    private final List<Object> objects = new ArrayList<>();
    private final List<Long> offsets = new ArrayList<>();
    private final Object[] holder = new Object[1];

    public Cells() throws Exception {
        Field theUnsafe = Unsafe.class.getDeclaredField("theUnsafe");
        theUnsafe.setAccessible(true);
        unsafe = (Unsafe) theUnsafe.get(null);
        // What Math.random, Collections.shuffle and SecureRandom make at their first use.
        Math.random();
        java.util.Collections.shuffle(new ArrayList<>(List.of(1, 2)));
        new java.security.SecureRandom().nextInt();
        counter((AtomicLong) statics("java.util.concurrent.ThreadLocalRandom", "seeder"));
        counter((AtomicLong) statics("java.util.Random", "seedUniquifier"));
        counter((AtomicLong) statics("java.util.SplittableRandom", "defaultGen"));
        random((Random) statics("java.lang.Math$RandomNumberGeneratorHolder", "randomNumberGenerator"));
        random((Random) statics("java.util.Collections", "r"));
        // A thread that has used ThreadLocalRandom has its own seed; one that has not takes the next of `seeder`.
        long seed = unsafe.objectFieldOffset(Thread.class.getDeclaredField("threadLocalRandomSeed"));
        ThreadGroup root = Thread.currentThread().getThreadGroup();
        while (root.getParent() != null) {
            root = root.getParent();
        }
        Thread[] all = new Thread[root.activeCount() * 2 + 16];
        int count = root.enumerate(all, true);
        for (int n = 0; n < count; n++) {
            cell(all[n], seed);
        }
    }

    private Object statics(String type, String name) throws Exception {
        Field field = Class.forName(type).getDeclaredField(name);
        return unsafe.getObject(unsafe.staticFieldBase(field), unsafe.staticFieldOffset(field));
    }

    private void counter(AtomicLong counter) throws Exception {
        cell(counter, unsafe.objectFieldOffset(AtomicLong.class.getDeclaredField("value")));
    }

    private void random(Random random) throws Exception {
        counter((AtomicLong) unsafe.getObject(random, unsafe.objectFieldOffset(Random.class.getDeclaredField("seed"))));
    }

    private void cell(Object object, long offset) {
        objects.add(object);
        offsets.add(offset);
    }

    /** NativePRNG mixes /dev/urandom with a generator of its own, but reads ahead: what it has read must go. */
    private void forgetReadAhead() throws Exception {
        Object secure = statics("sun.security.provider.NativePRNG", "INSTANCE");
        unsafe.putIntVolatile(secure, unsafe.objectFieldOffset(secure.getClass().getDeclaredField("buffered")), 0);
    }

    @Override
    public long applyAsLong(long question) {
        if (question < 0) {
            try {
                forgetReadAhead();
            } catch (Exception error) {
                throw new IllegalStateException(error);
            }
            return objects.size();
        }
        Object object = objects.get((int) (question / 4));
        long offset = offsets.get((int) (question / 4));
        switch ((int) (question % 4)) {
            case 0:
                holder[0] = object;
                long at = Unsafe.ARRAY_OBJECT_BASE_OFFSET;
                boolean narrow = Unsafe.ARRAY_OBJECT_INDEX_SCALE == 4;
                return narrow ? unsafe.getInt(holder, at) & 0xFFFFFFFFL : unsafe.getLong(holder, at);
            case 1:
                return offset;
            case 2:
                unsafe.putLongVolatile(object, offset, (question + 1) * 0x9e3779b97f4a7c15L);
                return unsafe.getLongVolatile(object, offset);
            default:
                return unsafe.getLongVolatile(object, offset);
        }
    }
}
